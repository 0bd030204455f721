# etcdctl as it is needed here; the key is root's.
ETCDCTL_ENDPOINTS=https://127.0.0.1:2379
ETCDCTL_CACERT=/etc/etcd/pki/etcd-ca.crt
ETCDCTL_CERT=/etc/etcd/pki/client.crt
ETCDCTL_KEY=/etc/etcd/pki/client.key
export ETCDCTL_ENDPOINTS ETCDCTL_CACERT ETCDCTL_CERT ETCDCTL_KEY
