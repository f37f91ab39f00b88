# shellcheck shell=bash
# Sourced by deploy_cpu.sh and deploy_gpu.sh: parses the options, checks the requirements, runs the
# command lines of CVAT's own deploy scripts, and tests the deployed function.

readonly EXIT_FAILED=1 EXIT_USAGE=2 EXIT_MISSING=3 EXIT_SELF_TEST=4

# A 64 x 64 picture with a bright square from (16, 16) to (48, 48).
readonly TEST_IMAGE='iVBORw0KGgoAAAANSUhEUgAAAEAAAABACAAAAACPAi4CAAAAP0lEQVR42mPUYKAMMDGMGjBqwKgBw8QAFnSBLQQ0+IwG4qgBowaMGjBqwKgBowYMdwMYR/sLowaMGjBqABQAAHddAdHLuBYXAAAAAElFTkSuQmCC'

say() { printf '%s\n' "$*"; }
complain() { printf '%s\n' "$*" >&2; }

fail() { # fail <exit code> <message>
    complain "$2"
    exit "$1"
}

usage() {
    cat <<END
Usage: $(basename "$0") [options] [FOLDER]

Deploys the function in FOLDER on the $1, so that CVAT lists it. Default: the folder of this script,
which is the tracker. Its folder interactor/ is the interactor, which runs in the tracker's image.

  --platform local|kube  where Nuclio runs (default local: Docker on this machine)
  --namespace NAME       Nuclio's namespace (default: nuctl's own, which CVAT's Docker setup uses)
  --project NAME         Nuclio's project (default cvat, the only one whose functions CVAT lists)
  --network NAME         Docker network of CVAT (default cvat_cvat)
  --port NUMBER          port of this machine for the function (default: the one in the yaml, 32270
                         for the tracker, 32271 for the interactor); only with --platform local
  --registry URL         registry the cluster pulls from; required with --platform kube
  --model ID             model to put into the image, for example facebook/sam2.1-hiera-large, or
                         micro (default: SAM2_MODEL_ID, else facebook/sam2.1-hiera-tiny)
  --torch-index URL      index of PyTorch's wheels for the build, for example
                         https://download.pytorch.org/whl/cu130 (default: the one in the Dockerfile,
                         on a GPU that in function-gpu.yaml)
  --image NAME           deploy this existing image instead of building one (docs/deployment.md)
  --build-only           build the image and deploy nothing, to use the image on another machine
  --env NAME=VALUE       environment variable of the function; may be repeated
  --no-self-test         do not ask the deployed function for a track or a mask
  --dry-run              print the commands instead of running them
  --help                 this text

Environment: CVAT_FUNCTIONS_REDIS_HOST, _PORT, _USERNAME, _PASSWORD, _DB, _SSL, _SSL_CA_CERTS and
_TIMEOUT are passed to the tracker when set. If the host is not set, the local platform uses CVAT's
own Redis (cvat_redis_ondisk:6666). If it is set but empty (CVAT_FUNCTIONS_REDIS_HOST=), tracks live
in the function: one worker, one replica, and a restart loses them.

Exit status: 0 deployed, $EXIT_FAILED a build or deployment failed, $EXIT_USAGE wrong options, $EXIT_MISSING a requirement is missing,
$EXIT_SELF_TEST deployed, but CVAT will not list the function or its self-test failed.
END
}

parse_arguments() { # parse_arguments <CPU or GPU> <script folder> <arguments...>
    kind=$1 folder=$2 code=$2
    shift 2
    platform=local namespace='' project=cvat network=cvat_cvat
    registry=${NUCTL_REGISTRY:-} model=${SAM2_MODEL_ID:-} image='' port='' torch_index=''
    self_test=yes dry_run=no build_only=no extra_env=()
    local given=no
    while (($#)); do
        case $1 in
            --help | -h)
                usage "$kind"
                exit 0
                ;;
            --dry-run) dry_run=yes ;;
            --no-self-test) self_test=no ;;
            --build-only) build_only=yes self_test=no ;;
            --platform | --namespace | --project | --network | --port | --registry | --model | --torch-index | --image | --env)
                (($# > 1)) || fail "$EXIT_USAGE" "$1 needs a value; see --help"
                case $1 in
                    --env)
                        [[ $2 =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] ||
                            fail "$EXIT_USAGE" "--env takes NAME=VALUE; see --help"
                        if [[ $2 == CVAT_FUNCTIONS_REDIS_* ]]; then
                            printf -v "${2%%=*}" '%s' "${2#*=}" # as if set in the environment
                        else
                            extra_env+=("$2")
                        fi
                        ;;
                    --torch-index) torch_index=$2 ;;
                    *) printf -v "${1#--}" '%s' "$2" ;;
                esac
                shift
                ;;
            -*) fail "$EXIT_USAGE" "$1 is not an option; see --help" ;;
            *)
                [[ $given == no ]] || fail "$EXIT_USAGE" "expected one folder, found two: $folder and $1"
                folder=$1 given=yes
                ;;
        esac
        shift
    done
    [[ $platform == local || $platform == kube ]] ||
        fail "$EXIT_USAGE" "--platform $platform is unknown: expected local or kube"
    [[ $build_only == no || $platform$image == local ]] ||
        fail "$EXIT_USAGE" "--build-only cannot be combined with --platform kube or --image"
    [[ -z $port ]] || [[ $platform == local && $build_only == no ]] ||
        fail "$EXIT_USAGE" "--port cannot be combined with --platform kube or --build-only"
    [[ -z $port ]] || [[ $port =~ ^[1-9][0-9]{0,4}$ && $port -le 65535 ]] ||
        fail "$EXIT_USAGE" "--port $port is not a port: expected a number from 1 to 65535"
    [[ -z $torch_index || $torch_index =~ ^https?://[A-Za-z0-9._:/@%+-]+$ ]] ||
        fail "$EXIT_USAGE" "--torch-index $torch_index is not a URL like https://download.pytorch.org/whl/cu130"
    torch_index=${torch_index%/}
    case $kind:${torch_index##*/} in
        CPU:cpu | GPU:cu[0-9]* | *:) ;;
        CPU:*) fail "$EXIT_USAGE" "--torch-index $torch_index is not for a CPU: expected a URL that ends in /cpu" ;;
        GPU:*) fail "$EXIT_USAGE" "--torch-index $torch_index is not for CUDA: expected a URL that ends in /cu126 or another version" ;;
    esac
    [[ -z $torch_index || -z $image ]] ||
        fail "$EXIT_USAGE" "--torch-index cannot be combined with --image, which builds nothing"
    [[ $model =~ ^[A-Za-z0-9._/-]*$ ]] ||
        fail "$EXIT_USAGE" "--model $model is not a model id like facebook/sam2.1-hiera-tiny"
}

first_match() { # first_match <text> <pattern>: what the pattern's group matches first, or nothing
    [[ ! $1 =~ $2 ]] || printf '%s\n' "${BASH_REMATCH[1]}"
}

yaml_value() { # yaml_value <yaml text> <indented key>: the key's first value, without quotes
    first_match "$1" $'\n'"$2: *'?([^'"$'\n'"]*)"
}

find_function() { # find_function <yaml name>
    # In a CVAT checkout the function is in <name>/nuclio; either folder may be given.
    [[ -f $folder/$1 || ! -f $folder/nuclio/$1 ]] || folder=$folder/nuclio
    [[ -f $folder/$1 ]] ||
        fail "$EXIT_USAGE" "$folder has no $1: give the folder of the function"
    folder=$(cd "$folder" && pwd)
    # The interactor's folder has no code; its code is in the folder of this script.
    [[ ! -f $folder/main.py ]] || code=$folder
    config=$1
    local yaml
    yaml=$(<"$folder/$config")
    function_name=$(yaml_value "$yaml" '  name')
    base_image=$(yaml_value "$yaml" ' *baseImage')
    function_image=$(yaml_value "$yaml" '    image')
    display_name=$(yaml_value "$yaml" '    name')
    function_type=$(yaml_value "$yaml" '    type')
    port=${port:-$(yaml_value "$yaml" '        port')}
    container=nuclio-${namespace:-${NUCTL_NAMESPACE:-nuclio}}-$function_name # as Nuclio names it on the local platform
    case $function_type in
        tracker) tab=Trackers ;;
        interactor) tab=Interactors ;;
        *) fail "$EXIT_USAGE" "$folder/$config is neither a tracker nor an interactor" ;;
    esac
}

collect_env() {
    local name suffix
    function_env=()
    [[ $build_only == no ]] || return 0
    if [[ $function_type == tracker ]]; then # the interactor has no state
        if [[ -z ${CVAT_FUNCTIONS_REDIS_HOST+set} && $platform == local ]]; then
            function_env+=(CVAT_FUNCTIONS_REDIS_HOST=cvat_redis_ondisk)
            CVAT_FUNCTIONS_REDIS_PORT=${CVAT_FUNCTIONS_REDIS_PORT:-6666}
        fi
        for suffix in HOST PORT USERNAME PASSWORD DB SSL SSL_CA_CERTS TIMEOUT; do
            name=CVAT_FUNCTIONS_REDIS_$suffix
            [[ -z ${!name:-} ]] || function_env+=("$name=${!name}")
        done
    fi
    ((${#extra_env[@]} == 0)) || function_env+=("${extra_env[@]}")
    ((${#function_env[@]} == 0)) || [[ $platform == kube ]] || [[ ${function_env[*]} != *\'* ]] ||
        fail "$EXIT_USAGE" "an environment value contains a single quote ('), which nuctl \
passes to a shell unescaped on the local platform: choose another password or value"
}

hide_password() { # hide_password <text>: prints the text without the password
    local password=${CVAT_FUNCTIONS_REDIS_PASSWORD:-}
    if [[ -n $password ]]; then
        printf '%s\n' "${1//"$password"/***}"
    else
        printf '%s\n' "$1"
    fi
}

print_command() {
    local word quoted line=''
    for word in "$@"; do
        printf -v quoted '%q' "$word"
        case $word in
            CVAT_FUNCTIONS_REDIS_PASSWORD=*) line+=' CVAT_FUNCTIONS_REDIS_PASSWORD=***' ;;
            *) line+=" $quoted" ;;
        esac
    done
    hide_password "+${line}"
}

run() { # run <command...>: prints the command and runs it, hiding the password in all output
    print_command "$@"
    [[ $dry_run == no ]] || return 0
    local line
    "$@" 2>&1 | while IFS= read -r line || [[ -n $line ]]; do hide_password "$line"; done
}

nuctl_options=()
set_nuctl_options() {
    nuctl_options=(--platform "$platform")
    [[ -z $namespace ]] || nuctl_options+=(--namespace "$namespace")
}

preflight_cvat() { # checks what a deployment to CVAT on this machine requires; adds to `missing`
    docker network inspect "$network" >/dev/null 2>&1 ||
        missing+=("the Docker network $network does not exist: start CVAT first, or name its network with --network")
    [[ $kind == GPU ]] || return 0
    # Docker can use NVIDIA's runtime, devices it discovered, or the hook that --gpus runs.
    [[ $(docker info --format '{{json .}}' 2>/dev/null) == *nvidia* ]] ||
        command -v nvidia-container-runtime-hook >/dev/null ||
        missing+=("Docker has no access to GPUs: install NVIDIA's container toolkit, run 'nvidia-ctk runtime configure' and restart Docker")
}

preflight_port() { # checks that no other program has the function's port; adds to `missing`
    local user
    user=$(docker ps --filter "publish=$port" --format '{{.Names}}' 2>/dev/null || true)
    if [[ $user == "$container" ]]; then
        return 0 # the function that is replaced
    elif [[ -n $user ]]; then
        missing+=("port $port is used by the container ${user//$'\n'/, }: choose another with --port")
    elif (: >"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
        missing+=("port $port is used by another program: choose another with --port")
    fi
}

preflight() {
    local missing=() tool tools=(docker nuctl) client server
    [[ $self_test == no || $platform == kube ]] || tools+=(curl)
    for tool in "${tools[@]}"; do
        command -v "$tool" >/dev/null || missing+=("$tool is not installed (or not on PATH)")
    done
    if [[ $platform == kube && -z $registry$image ]]; then
        missing+=("no registry to pull the image from: set --registry, or --image")
    fi
    if ! command -v docker >/dev/null; then
        :
    elif ! docker info >/dev/null 2>&1; then
        missing+=("the Docker daemon does not answer ('docker info' says why)")
    else
        ! builds_on_the_trackers_image || docker image inspect "$base_image" >/dev/null 2>&1 ||
            missing+=("the image $base_image does not exist: deploy the tracker first, or build its image with $(basename "$0") --build-only")
        ! builds_the_base_image || docker buildx version >/dev/null 2>&1 ||
            missing+=("Docker's buildx plugin is not installed, which builds the image (package docker-buildx or docker-buildx-plugin)")
        if [[ $platform == local && $build_only == no ]]; then
            preflight_cvat
            preflight_port
        fi
    fi
    if ((${#missing[@]})); then
        complain "Cannot deploy:"
        for tool in "${missing[@]}"; do complain "  - $tool"; done
        exit "$EXIT_MISSING"
    fi
    [[ $platform == local && $build_only == no ]] || return 0
    # CVAT gets its functions from Nuclio's dashboard, a container of CVAT's compose files.
    server=$(docker inspect --format '{{.Config.Image}}' nuclio 2>/dev/null || true)
    server=$(first_match "$server" '([0-9]+\.[0-9]+\.[0-9]+)')
    client=$(nuctl version 2>/dev/null || true)
    client=$(first_match "$client" 'Label: *([0-9]+\.[0-9]+\.[0-9]+)')
    if [[ -z $server ]]; then
        complain "Warning: no container named nuclio (Nuclio's dashboard) is running, and CVAT needs it. Start CVAT with components/serverless/docker-compose.serverless.yml."
    elif [[ $client != "$server" ]]; then
        complain "Warning: the version of nuctl is ${client:-unknown}, that of Nuclio's dashboard $server. If the deployment fails, use nuctl $server."
    fi
}

builds_on_the_trackers_image() { # only on a GPU: on a CPU this script builds the base image itself
    [[ $kind == GPU && $function_type == interactor && -z $image ]]
}

builds_the_base_image() { # on a GPU, Nuclio builds everything from public images
    [[ $kind == CPU && -z $image ]]
}

stage_function() {
    # nuctl copies the whole folder into the image, and fails on links to folders, such as those in a
    # virtual environment. So it gets a copy of the files that the function imports, readable to all.
    local work
    work=$(mktemp -d)
    # shellcheck disable=SC2064 # expand the name now, not at exit
    trap "rm -rf -- '$work'" EXIT
    stage=$work/function
    mkdir "$stage"
    # what the Dockerfile copies: .dockerignore leaves out the same files
    cp -- "$code"/*.py "$code"/requirements.txt "$code"/requirements-torch.txt "$folder/$config" "$stage/"
    rm -f -- "$stage/track_video.py" "$stage/track_task.py"
    mkdir "$stage/deploy"
    cp -- "$code/deploy/check_torch_index.py" "$code/deploy/download_weights.py" "$stage/deploy/"
    cp -R -- "$code/interaction" "$code/weights" "$stage/"
    rm -rf -- "$stage/interaction/__pycache__"
    if [[ -n $model ]] && builds_on_the_trackers_image; then
        complain "Note: the interactor uses the model in the image $base_image; the model $model is ignored."
    elif [[ -n $model && $kind == GPU ]]; then
        sed -i.bak "s|\(value: SAM2_MODEL_ID=\)[A-Za-z0-9._/-]*$|\1$model|" "$stage/$config"
    fi
    if [[ -n $torch_index ]] && builds_on_the_trackers_image; then
        complain "Note: the interactor uses PyTorch in the image $base_image; --torch-index is ignored."
    elif [[ -n $torch_index && $kind == GPU ]]; then
        sed -i.bak "s|\(value: TORCH_INDEX=\).*$|\1$torch_index|" "$stage/$config"
    fi
    if [[ $platform == local ]]; then
        sed -i.bak "s/^        port: .*$/        port: $port/" "$stage/$config"
    else
        sed -i.bak '/^        port: /d' "$stage/$config" # Kubernetes would take it for a node port
    fi
    if [[ -n $image ]]; then
        # nuctl builds an image whenever the yaml has a build section
        sed -i.bak '/^  build:/,/^  [^ #]/ { /^  build:/d; /^  [^ #]/!d; }' "$stage/$config"
    fi
    rm -f -- "$stage/$config.bak"
    # The modes of a clone and of an archive differ, and Docker's build cache compares them.
    chmod -R u=rwX,go=rX "$work"
    cd "$work" || exit # nuctl writes temporary files into the current folder
    [[ $dry_run == no ]] ||
        say "# $stage is a copy of $folder/$config and of the files in $code that the Dockerfile copies"
}

build_base_image() {
    local arguments=(--tag "$base_image") name
    [[ -z $model ]] || arguments+=(--build-arg "SAM2_MODEL_ID=$model")
    [[ -z $torch_index ]] || arguments+=(--build-arg "TORCH_INDEX=$torch_index")
    for name in HTTP_PROXY HTTPS_PROXY NO_PROXY http_proxy https_proxy no_proxy; do
        # By name only: Docker reads the value, which may hold a password, from the environment.
        [[ -z ${!name:-} ]] || arguments+=(--build-arg "$name")
    done
    export DOCKER_BUILDKIT=1
    run docker build "${arguments[@]}" --file "$code/Dockerfile" "$stage" ||
        fail "$EXIT_FAILED" "The base image was not built; nothing was deployed."
}

ensure_project() {
    if [[ $dry_run == no ]] &&
        nuctl get project "$project" "${nuctl_options[@]}" >/dev/null 2>&1; then
        return 0
    fi
    run nuctl create project "$project" "${nuctl_options[@]}" ||
        fail "$EXIT_FAILED" "Nuclio's project $project was not created; nothing was deployed."
}

build_image() { # --build-only
    # 'nuctl build' crashes on the local platform. A disabled function of another name is built
    # likewise, without stopping the function that runs under the real name.
    local build_name=$function_name-build built=yes
    run nuctl deploy "$build_name" --project-name "$project" --path "$stage" \
        --file "$stage/$config" "${nuctl_options[@]}" --disable || built=no
    run nuctl delete function "$build_name" "${nuctl_options[@]}" ||
        complain "Warning: the disabled function $build_name was not deleted; nothing uses it."
    [[ $built == yes ]] || fail "$EXIT_FAILED" "The image was not built."
}

deploy_function() {
    local arguments=(--file "$stage/$config" "${nuctl_options[@]}") pair
    if [[ -n $image ]]; then
        arguments+=(--run-image "$image")
    else
        arguments=(--path "$stage" "${arguments[@]}")
        [[ $platform == local ]] || arguments+=(--registry "$registry")
    fi
    ((${#function_env[@]} == 0)) ||
        for pair in "${function_env[@]}"; do arguments+=(--env "$pair"); done
    if [[ $platform == local ]]; then
        arguments+=(--platform-config "{\"attributes\": {\"network\": \"$network\"}}")
    fi
    run nuctl deploy --project-name "$project" "${arguments[@]}" ||
        fail "$EXIT_FAILED" "The function was not deployed. An earlier version of it may have been removed: check 'nuctl get function --platform $platform'."
}

ask() { # ask <path> [<JSON body>]: prints the function's answer
    if [[ $platform == kube ]]; then
        local url="/api/v1/namespaces/$function_namespace/services/nuclio-$function_name:8080/proxy$1"
        if (($# > 1)); then
            kubectl create --raw "$url" --filename - <<<"$2"
        else
            kubectl get --raw "$url"
        fi
    elif (($# > 1)); then
        # Without a proxy, which could not reach this machine's own ports.
        curl --silent --show-error --fail --noproxy '*' --max-time 120 \
            --header 'Content-Type: application/json' --data "$2" "http://127.0.0.1:$port$1"
    else
        curl --silent --show-error --fail --noproxy '*' --max-time 30 "http://127.0.0.1:$port$1"
    fi
}

test_function() {
    ask /healthz >/dev/null ||
        fail "$EXIT_SELF_TEST" "The function was deployed but is not healthy. Its log: $log_command"
    "test_$function_type"
}

test_interactor() {
    local answer
    answer=$(ask / "{\"image\": \"$TEST_IMAGE\", \"pos_points\": [[32, 32]], \"neg_points\": [], \"obj_bbox\": []}") ||
        fail "$EXIT_SELF_TEST" "The function is healthy but does not answer a click. Its log: $log_command"
    [[ $answer == *'"shapes"'* ]] ||
        fail "$EXIT_SELF_TEST" "The function answered a click with no shape. Its log: $log_command"
    say "Self-test passed: the function is healthy and answers a click."
}

test_tracker() {
    local answer states
    answer=$(ask / "{\"image\": \"$TEST_IMAGE\", \"shapes\": [{\"type\": \"rectangle\", \"points\": [16, 16, 48, 48]}], \"states\": []}") ||
        fail "$EXIT_SELF_TEST" "The function is healthy but does not start a track. Its log: $log_command"
    # The JSON list of states, unchanged, as CVAT sends it back.
    states=$(first_match "$answer" '"states": *(\[[^]]*\])')
    [[ -n $states && $states != '[]' ]] ||
        fail "$EXIT_SELF_TEST" "The function started a track but answered no state. Its log: $log_command"
    ask / "{\"image\": \"$TEST_IMAGE\", \"shapes\": [null], \"states\": $states}" >/dev/null ||
        fail "$EXIT_SELF_TEST" "The function does not continue the track that it started (can it reach Redis?). Its log: $log_command"
    say "Self-test passed: the function is healthy, starts a track and continues it."
}

report() {
    local status reasons=() log_command port docker_port port_mismatch='' function_namespace
    status=$(nuctl get function "$function_name" "${nuctl_options[@]}" --output json) ||
        fail "$EXIT_SELF_TEST" "nuctl does not find the function that it has just deployed."
    status=${status//[[:space:]]/}
    port=$(first_match "$status" '"httpPort":([0-9]+)')
    function_namespace=$(first_match "$status" '"namespace":"([^"]*)"')
    if [[ $platform == kube ]]; then
        log_command="kubectl --namespace $function_namespace logs deployment/nuclio-$function_name"
    else
        log_command="docker logs nuclio-$function_namespace-$function_name"
        [[ $function_namespace == nuclio ]] || reasons+=("its namespace is $function_namespace, not nuclio")
        [[ -n $port ]] || reasons+=("it has no port")
        docker_port=$(docker port "nuclio-$function_namespace-$function_name" 8080 2>/dev/null || true)
        docker_port=$(first_match "$docker_port" ':([0-9]+)')
        if [[ -n $docker_port && $docker_port != "$port" ]]; then
            port_mismatch="Nuclio calls it on port $port, but its container has port $docker_port: deploy it again"
            reasons+=("$port_mismatch")
        fi
    fi
    [[ $status == *'"nuclio.io/project-name":"cvat"'* ]] || reasons+=("its project is not cvat")
    [[ $status == *"\"type\":\"$function_type\""* ]] || reasons+=("its annotation type is not $function_type")
    [[ $status == *'"state":"ready"'* ]] || reasons+=("its state is not ready")
    if [[ $self_test == no ]]; then
        :
    elif [[ $platform == kube ]] && ! command -v kubectl >/dev/null; then
        say "Self-test skipped: kubectl, which reaches the function inside the cluster, is not installed."
    elif [[ $platform == kube ]] || [[ -n $port && -z $port_mismatch ]]; then
        test_function
    fi
    [[ $platform == local ]] ||
        say "CVAT must look for functions in the namespace $function_namespace (CVAT_NUCLIO_FUNCTION_NAMESPACE)."
    if ((${#reasons[@]})); then
        local joined
        printf -v joined '%s; ' "${reasons[@]}"
        fail "$EXIT_SELF_TEST" "CVAT will not list it: ${joined%; }."
    fi
    [[ $platform == kube ]] || say "It listens on port $port of this machine."
    say "CVAT will list it: AI Tools, $tab, $display_name (reload the page)."
}

deploy() { # deploy <CPU or GPU> <yaml name> <script folder> <arguments...>
    local yaml=$2
    parse_arguments "$1" "$3" "${@:4}"
    find_function "$yaml"
    collect_env
    set_nuctl_options
    [[ $dry_run == yes ]] || preflight
    stage_function
    ! builds_the_base_image || build_base_image
    ensure_project
    if [[ $build_only == yes ]]; then
        build_image
    else
        deploy_function
    fi
    [[ $dry_run == no ]] || return 0
    if [[ $build_only == yes ]]; then
        say "Built $function_image. On the machine where CVAT runs, deploy it with --image $function_image."
    else
        report
    fi
}
