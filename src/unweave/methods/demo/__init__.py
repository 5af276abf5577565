"""The main job on the default model and text."""
