"""Build the images and run what docs/deploying.md says, with Docker or Podman: `make images`, `make containers-test`.

tool.py     Docker, or Podman behind a socket of its own
images.py   the two images, and stand-ins for those of others where no registry of images can be reached
site.py     what compose has started: its containers, their health, clients of the gateways
serving.py  one machine: a user is served, adapted, kept over `down` and `up`, and erased
keeping.py  one machine: its store is copied and brought back, its secret exchanged
losing.py   a fleet: each container is killed under load
rolling.py  a fleet: images are exchanged under load
watching.py a fleet: Prometheus and an alert
"""
