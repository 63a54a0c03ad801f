"""One plain function a command: floor 4."""
