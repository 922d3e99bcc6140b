// The stripe-wise convolution on the CPU; what Python calls. The operation is defined in reference.py.
#include <memory>
#include "images.h"
#include "pixels.h"

// A call of the layer with images of one size.
struct Call {
    const Layer& layer;
    const Images images;
    const std::unique_ptr<const PixelGrid> grid;  // where pixels are the lanes

    template <class T>
    void run(const T* x, T* y) const {
        if (grid) run_pixels(layer, *grid, x, y);
        else run_images(layer, images, x, y);
    }
};

extern "C" {

// A layer for run(); pattern [filter][kernel row][kernel column], stripes as in StripeConv2d, bias [filter].
void* prepare(const Shape* shape, const Tuning* tuning, const uint8_t* pattern, const float* stripes, const float* bias) {
    Layer* layer = new Layer{*shape, *tuning, {bias, bias + shape->filters}, {}};
    const int64_t parts = std::min(tuning->filter_blocks, shape->filters);
    const Stripes alive(*shape, pattern, stripes);
    for (int64_t k = 0; k < parts; ++k) {
        layer->blocks.push_back({k * shape->filters / parts, (k + 1) * shape->filters / parts, {}, {}, {}, {}, {}, {}});
        pack(*layer, layer->blocks.back(), alive);
    }
    return layer;
}

// The layer must outlive it.
void* arrange(const void* layer, const Images* images) {
    const Layer& prepared = *static_cast<const Layer*>(layer);
    return new Call{prepared, *images, std::unique_ptr<const PixelGrid>(prepared.tuning.in_images() ? nullptr : new PixelGrid(prepared, *images))};
}

// x and y are of the type that the call was arranged for.
void run(const void* call, const void* x, void* y) {
    const Call& arranged = *static_cast<const Call*>(call);
    switch (arranged.images.type) {
        case 0: return arranged.run(static_cast<const float*>(x), static_cast<float*>(y));
#ifdef HAS_HALVES
        case 1: return arranged.run(static_cast<const Bfloat16*>(x), static_cast<Bfloat16*>(y));
        case 2: return arranged.run(static_cast<const Float16*>(x), static_cast<Float16*>(y));
#endif
    }
}

void release_layer(void* layer) { delete static_cast<Layer*>(layer); }
void release_call(void* call) { delete static_cast<Call*>(call); }

int lanes() { return LANES; }

// Whether inputs of bfloat16 can be multiplied in matrix tiles.
int has_tiles() {
#ifdef HAS_TILES
    static const bool allowed = tiles_allowed();
    return allowed;
#else
    return 0;
#endif
}

// Whether inputs of 16 bits need no conversion.
int has_halves() {
#ifdef HAS_HALVES
    return 1;
#else
    return 0;
#endif
}
}
