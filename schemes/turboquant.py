"""TurboQuant: a random rotation, then the best table for a coordinate of a random unit vector (arXiv 2504.19874).

y = Q x with Q orthogonal, s = |x|/sqrt(d) in fp16, c = the nearest level of y/s, x^ = Q^T s*level[c] (algorithm 1).
The levels are Lloyd and Max's for the beta law of the coordinates, a function of d and the bits alone.  Every token is
coded as it arrives.

turboquant_prod codes with a bit less, and what is left, r = x - x^, by the signs of a Gaussian sketch: it reads
x^ + sqrt(pi/2)/d * |r| * S^T sign(S r), whose inner products with any query are right in the mean (algorithm 2).

turboquant_2p5 and turboquant_3p5 are two independent instances (section 4.3): a quarter of a head's channels, the
largest of calibration data, has a bit more than the others, each part a rotation and a norm of its own.  2.5 is
(96*2 + 32*3 + 2*16)/128.  How many channels and bits 3.5 stands for is not told: chosen here, alike.
"""

from kvdsl.scheme import Codebook, Rotate, Scheme, Sketch, Store, TopChannels, per_token

turboquant4 = Scheme(
    both=Store(Codebook(4, "beta"), scale=per_token(), transform=Rotate("orthogonal", seed=0)),
    source="arXiv 2504.19874, algorithm 1",
)
turboquant3 = turboquant4.with_(bits=3)
turboquant2 = turboquant4.with_(bits=2)
turboquant1 = turboquant4.with_(bits=1)


def _prod(scheme: Scheme) -> Scheme:
    signs = scheme.keys.with_(residual=Sketch(basis="gaussian", seed=1))
    return scheme.with_(both=signs, source="arXiv 2504.19874, algorithm 2")


turboquant_prod4 = _prod(turboquant3)
turboquant_prod3 = _prod(turboquant2)
turboquant_prod2 = _prod(turboquant1)


def _split(scheme: Scheme, more: Scheme) -> Scheme:
    parted = scheme.keys.with_(outliers=TopChannels(0.25, store=more.keys))
    return scheme.with_(both=parted, source="arXiv 2504.19874, two instances")


turboquant_3p5 = _split(turboquant3, turboquant4)
turboquant_2p5 = _split(turboquant2, turboquant3)
