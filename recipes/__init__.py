"""The recipes: one module per baked product."""

import os

# Else pydantic looks for plugins in every package that is installed, at each start.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
