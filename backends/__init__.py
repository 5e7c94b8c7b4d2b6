"""The kernels: one folder per backend, installed as `hata.backends`.

Nothing is imported here. `hata.registry` knows the backends by name and loads one when it is first
used, so that a library that is missing or broken harms only the backend that needs it. Backends
import `hata` and never one another; one file per op stands under the same name in each of them.
"""
