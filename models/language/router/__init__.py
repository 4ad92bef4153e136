"""Router bundles: from which confidence on a device may answer for one model in the cloud."""
