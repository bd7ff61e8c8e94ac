"""What two models look at: attention similarity and overlays."""
