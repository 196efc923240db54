"""What runs on a Ray cluster: batch jobs, images, manifests."""
