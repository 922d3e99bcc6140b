// The stripe-wise convolution on the CPU; what Python calls. The operation is defined in reference.py.
#include "images.h"
#include "pixels.h"

extern "C" {

// A layer for run(); pattern [filter][kernel row][kernel column], stripes as in StripeConv2d, bias [filter].
void* prepare(const Shape* shape, const Tuning* tuning, const uint8_t* pattern, const float* stripes, const float* bias) {
    Layer* layer = new Layer{*shape, *tuning, {bias, bias + shape->filters}, {}};
    const int64_t parts = std::min(tuning->filter_blocks, shape->filters);
    for (int64_t k = 0; k < parts; ++k) {
        layer->blocks.push_back({k * shape->filters / parts, (k + 1) * shape->filters / parts, {}, {}, {}});
        pack(*layer, layer->blocks.back(), pattern, stripes);
    }
    return layer;
}

void run(const void* layer, const float* x, float* y, const Images* images) {
    const Layer& prepared = *static_cast<const Layer*>(layer);
    (prepared.tuning.layout == 1 ? run_images : run_pixels)(prepared, x, y, *images);
}

void release(void* layer) { delete static_cast<Layer*>(layer); }

int lanes() { return LANES; }
}
