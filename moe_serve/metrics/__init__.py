"""Our metrics: one catalogue, gathered from engines, proxy, GPU and operating system."""
