#!/usr/bin/env bash
# Deploy the GPU function to Nuclio for CVAT; --help lists the options.

set -euo pipefail

script_folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=deploy/deploy_lib.sh
source "$script_folder/deploy/deploy_lib.sh"

deploy GPU function-gpu.yaml "$script_folder" "$@"
