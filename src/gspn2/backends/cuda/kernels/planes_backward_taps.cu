// Gradients of shared taps of one direction from those of their weights: the parts that the clusters of a group left in
// scratch memory, summed in order.
// Knobs: 0 direction (its index among the scans), 1 parts, 2 elements of a row in scratch memory.
// Scratch: 2 the parts, [parts][B][G][3][H][row].
#include "common.cuh"

KERNEL(256, 1) planes_backward_taps(CONSTANT_PARAMS p) {
  const Scan scan = scan_of(p, p.knobs[0]);
  const int d = p.knobs[0], parts = p.knobs[1], pitch = p.knobs[2];
  const long long plane = (long long)p.height * pitch, planes = (long long)p.batch * p.groups;
  const float* from = (const float*)p.scratch[2];
  const long long stride = (long long)gridDim.x * blockDim.x;
  for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < planes * p.height * p.width; i += stride) {
    const int w = i % p.width, h = i / p.width % p.height;
    const long long index = i / p.width / p.height;
    const int place = scan.vertical ? w : h;
    const float* part = from + index * 3 * plane + (long long)h * pitch + w;
    Taps dw = {0.f, 0.f, 0.f};
    for (int k = 0; k < parts; k += SUM_RUN) {
      Taps run = {0.f, 0.f, 0.f};
      for (int l = k; l < min(parts, k + SUM_RUN); l++, part += planes * 3 * plane)
        run.add({__ldcs(part), __ldcs(part + plane), __ldcs(part + 2 * plane)});
      dw.add(run);
    }
    const int b = index / p.groups, g = index % p.groups;
    const storage_t* a = p.taps.data + (b * p.taps.b + d * p.taps.d + g * p.taps.c + h * p.taps.h + w * p.taps.w);
    storage_t* out = p.dtaps.data + (b * p.dtaps.b + d * p.dtaps.d + g * p.dtaps.c + h * p.dtaps.h + w * p.dtaps.w);
    const Taps taps = {widen(a[0]), widen(a[p.taps.k]), widen(a[2 * p.taps.k])};
    const Taps da = tap_gradient(taps, dw, place > 0, place + 1 < scan.places);
    out[0] = narrow(da.before);
    out[p.dtaps.k] = narrow(da.here);
    out[2 * p.dtaps.k] = narrow(da.after);
  }
}
