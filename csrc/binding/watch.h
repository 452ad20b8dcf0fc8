// Whether tensors that a copy was made of still hold what they held; CPU only.
#pragma once

#include "arguments.h"

namespace ember {
namespace binding {

// A number that changes with the values of the tensors, their sizes, or their dtypes. Reads all of
// them, at about the speed of memory. To be compared within one process.
int64_t fingerprint(const Tensors& tensors);

// Keeps the tensors and their fingerprint as of now, for unchanged(), under a number > 0. To hand a
// list of tensors over with every call would take longer than a step of a small network.
int64_t watch(Tensors tensors);

// Whether the tensors of a watch have the fingerprint that they had; true for 0, which is no watch.
// Sees all that happens to them: new values, by whatever way, another .data, other strides.
bool unchanged(int64_t watch);

}  // namespace binding
}  // namespace ember
