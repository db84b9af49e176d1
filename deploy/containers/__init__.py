"""Build the images and run what docs/deploying.md says, with Docker or Podman: `make images`, `make containers-test`.

tool.py     Docker, or Podman behind a socket of its own
images.py   the two images, and stand-ins for those of others where no registry of images can be reached
site.py     what compose has started: its containers, their health, clients of the gateways
single.py   checks of one machine: restart and persistence
fleet.py    checks of a fleet: deaths and replacement under load, and alerts
"""
