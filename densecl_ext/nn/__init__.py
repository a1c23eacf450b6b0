"""The modules around the ops: queue, losses, momentum encoder, matching, necks, the model."""
