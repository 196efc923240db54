"""Several real raylets on one machine, and what befalls them: nodes die, are drained, come back."""
