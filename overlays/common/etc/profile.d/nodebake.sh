# The cluster's programs for whoever logs in.
PATH="$PATH:/opt/nodebake/current/bin"
export PATH
