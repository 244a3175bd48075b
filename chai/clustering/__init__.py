"""Cluster heads: features, K-means, representatives, the number of clusters, and metrics of clusterings."""
