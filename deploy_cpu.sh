#!/usr/bin/env bash
# Deploy the CPU function to Nuclio for CVAT; --help lists the options.

set -euo pipefail

script_folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=deploy/deploy_lib.sh
source "$script_folder/deploy/deploy_lib.sh"

deploy CPU function.yaml "$script_folder" "$@"
