"""The daemon on every control plane. All of them run at once and none leads: what two may do at the same time is
decided by the API server's compare-and-swap.

    main.py         arguments, threads, readiness
    inventory.py    the artifact on this machine, and the inventory that the cluster holds
    objects.py      applies the cluster's objects, under lease.py
    approve.py      approves certificate requests; judge.py decides, without any I/O
    tokens.py       brings bootstrap tokens and retires them
    labels.py       labels Nodes
    api.py          speaks with the API server; credentials.py mints what it does so with
    mirror.py       a local copy of a collection; work.py what is to be looked at; log.py what is said
"""
