// The backward pass of refractory LIF attention of 16-bit types
// (refractory_lif_attention_half.cuh).
//
//   above     a, the gradient of u from the loads (refractory_lif_attention_backward.cuh)
//   delta     delta, R, and of E = sum_j p dp all but what comes from tau
//   previous  grad_previous_load
//   keys      walks the queries in reverse with c in hand: c where each 16 queries end, grad_value,
//             and grad_key with what is known of E
//   queries   the rest of E, grad_query, the gates' gradients
//   means     grad_key with the rest of E
//
// Only c, which `keys` makes, says what E is, and only E what grad_key is. As grad_key is linear in
// E, another sweep of one product each and no gate does for the rest.
#pragma once

#include "refractory_lif_attention_half_keys.cuh"
#include "refractory_lif_attention_half_queries.cuh"
