"""EK-FAC: K-FAC's eigenbasis with the exact second moments in it (George et al. 2018; [MS] section 3.3)."""

from __future__ import annotations

from lightning_influence.curvature.kronecker import KroneckerCurvature


class EKFAC(KroneckerCurvature):
    """Two passes: covariances for the basis, then the mean squares Lambda of the rotated example gradients.

    The covariances are A of a layer's inputs and S of the gradients at its outputs. Never farther from E[g g^T] in
    Frobenius norm than K-FAC, since Lambda is the best diagonal in the basis.

    How a component is covered:

    - linear layers and convolutions (patches are the positions): Kronecker factors;
    - normalisation, grouped convolutions and all else without that structure: the exact block E[g g^T] up to 1024
      parameters, its diagonal beyond;
    - embeddings (one row for each token) and tied weights: the diagonal.

    Args:
        damping: Absolute damping; None takes a share of each component's mean eigenvalue.
        damping_share: That share; 0.1 as in Grosse et al. 2023.
        fisher: ``"sampled"`` labels from the model, or ``"empirical"``.
        seed: Of the sampled labels, and of what ``covariance_share`` draws.
        covariance_share: Chance of each example or token to be in A and S, which only have to be known well enough for
            a basis; EK-FAC's Lambda, and components without factors, are always of all of the data. What is drawn
            depends on ids and seed alone. With ``covariance_of="examples"`` EK-FAC's first pass is that much shorter.
        covariance_of: ``"examples"`` or ``"tokens"`` (positions of a layer's inputs).
        max_width: Factors that are wider are kept as the fewest diagonal blocks, about equally wide, that are not: for
            k blocks 1/k of the memory, 1/k^2 of the eigendecomposition. None keeps factors whole.

    Raises:
        ValueError: If an argument is out of range.
    """

    num_passes = 2
