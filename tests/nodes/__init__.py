"""Several real raylets on one machine, and what befalls them: a node is killed, the head restarts, a node is drained."""
