"""`penstock launch ray`: Ray places the processes of a run on the nodes of its cluster, and monitors the nodes."""
