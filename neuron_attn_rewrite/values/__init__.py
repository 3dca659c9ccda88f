"""Which values a node of the graph may take, over all inputs."""
