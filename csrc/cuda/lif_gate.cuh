// The LIF gate on a GPU: one read of x and one write of y forward; one read of x and grad_y and one
// write of grad_x backward.
//
// A thread works on several packs at once, so that their loads overlap. Where a norm, or sums over
// rows, need whole rows, they lie along a row, which belongs to a team of threads: part of a warp,
// a warp, which needs no barriers, or a block. The row stays in registers between the sums for its
// norms and what follows from them; only columns beyond what a team holds are read twice. Else the
// packs lie below each other, in rows that share the parameters of their columns.
//
// lif_gate_rows.cuh is for the rows that most models have; lif_gate_forward.cuh and
// lif_gate_backward.cuh are for all.
//
// Parameter gradients are added up in two stages in an order that depends on the shape alone: each
// block leaves partial sums, and a second kernel adds those.
#pragma once

#include "lif_gate_backward.cuh"
#include "lif_gate_forward.cuh"
#include "lif_gate_rows.cuh"
#include "lif_gate_sums.cuh"
