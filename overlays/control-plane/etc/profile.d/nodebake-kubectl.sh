# kubectl takes the desk's admin.conf, where an administrator has put it there.
if [ -z "${KUBECONFIG:-}" ] && grep -qs '^kind: Config' /etc/kubernetes/admin.conf; then
    KUBECONFIG=/etc/kubernetes/admin.conf
    export KUBECONFIG
fi
