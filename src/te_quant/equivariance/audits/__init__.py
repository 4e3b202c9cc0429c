"""Where a model loses equivariance: the audit layer by layer and the constant-image probe."""
