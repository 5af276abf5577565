"""Files of trained SAEs, in and out; every format folds into ``SAE`` on load. ``registry.py`` holds the list."""
