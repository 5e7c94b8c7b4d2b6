// Nothing: what is asked of the driver is how many clusters of such blocks a GPU holds at once.

extern "C" __global__ void probe() {}
