#!/bin/sh
# Sign a webhook, or verify one, with openssl; send a signed one with curl. To try a receiver out.
#
#     WEBHOOK_SECRET=… ./sign.sh sign ID TIMESTAMP < body.json             prints v1,…
#     WEBHOOK_SECRET=… ./sign.sh verify ID TIMESTAMP 'v1,… v1,…' < body.json
#     WEBHOOK_SECRET=… ./sign.sh send URL < body.json                      prints the HTTP status
#
# The key is visible in the process list while openssl runs: for your own machine, not for production.
set -eu

# The secret's key in hex: `whsec_` is followed by base64, other secrets are text.
key_hex() {
    case $WEBHOOK_SECRET in
        whsec_*) printf %s "${WEBHOOK_SECRET#whsec_}" | openssl base64 -d -A ;;
        *) printf %s "$WEBHOOK_SECRET" ;;
    esac | od -An -v -tx1 | tr -d ' \n'
}

# What is signed is the id, the time and the body as it is, joined with full stops.
sign() {
    digest=$({ printf '%s.%s.' "$1" "$2" && cat; } |
        openssl dgst -sha256 -mac HMAC -macopt "hexkey:$(key_hex)" -binary | openssl base64 -A)
    printf 'v1,%s' "$digest"
}

verify() {
    age=$(($(date +%s) - $2))
    if [ "$age" -gt 300 ] || [ "$age" -lt -300 ]; then
        echo "too old or too new: $age s" >&2
        return 1
    fi
    case " $3 " in
        *" $(sign "$1" "$2") "*) echo verified ;;
        *) echo "no signature fits" >&2; return 1 ;;
    esac
}

send() {
    body=$(mktemp)
    trap 'rm -f "$body"' EXIT
    cat > "$body"
    id=evt_test_$(openssl rand -hex 8)
    now=$(date +%s)
    curl --silent --show-error --output /dev/null --write-out '%{http_code}\n' \
        --header 'Content-Type: application/json' \
        --header "webhook-id: $id" \
        --header "webhook-timestamp: $now" \
        --header "webhook-signature: $(sign "$id" "$now" < "$body")" \
        --data-binary "@$body" "$1"
}

command=${1:?sign, verify or send}
shift
case $command in
    sign) sign "$@" && echo ;;
    verify | send) "$command" "$@" ;;
    *) echo "unknown command: $command" >&2; exit 2 ;;
esac
