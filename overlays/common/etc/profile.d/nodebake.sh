# The cluster's programs for whoever logs in.
PATH="$PATH:/opt/nodebake/current/bin"
export PATH
if [ -z "${KUBECONFIG:-}" ] && [ -r /etc/kubernetes/admin.conf ]; then
    # Never baked: an administrator who works on a control plane may put the desk's admin.conf here.
    KUBECONFIG=/etc/kubernetes/admin.conf
    export KUBECONFIG
fi
