"""A learnt model as a folder that runs without torch: see `bundle.export` and `unispect.runtime`."""
