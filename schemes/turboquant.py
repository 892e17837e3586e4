"""TurboQuant: a random rotation, then the best table for a coordinate of a random unit vector (arXiv 2504.19874).

y = Q x with Q orthogonal, s = |x|/sqrt(d) in fp16, c = the nearest level of y/s, x^ = Q^T s*level[c] (algorithm 1).
The levels are Lloyd and Max's for the beta law of the coordinates, a function of d and the bits alone.  Every token is
coded as it arrives.
"""

from kvdsl.scheme import Codebook, Rotate, Scheme, Store, per_token

turboquant4 = Scheme(
    both=Store(Codebook(4, "beta"), scale=per_token(), transform=Rotate("orthogonal", seed=0)),
    source="arXiv 2504.19874, algorithm 1",
)
turboquant3 = turboquant4.with_(bits=3)
turboquant2 = turboquant4.with_(bits=2)
turboquant1 = turboquant4.with_(bits=1)
