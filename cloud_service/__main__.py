"""`python -m isthmus.cloud_service`, the same as `cloud-service`."""

from isthmus.cloud_service.cli import main

main()
