"""`python -m isthmus.edge_agent`, the same as `edge-agent`."""

from isthmus.edge_agent.cli.main import main

main()
