// How evenly the tokens of a layer spread over its experts.

/**
 * Of visits by expert: their `total`, the experts `used`, the `entropy` of the shares in bits, the number of equally
 * busy experts with that entropy (`effective`), and the busiest expert's visits over the mean (`maxOverMean`).
 */
export function balance(visits) {
  const total = visits.reduce((sum, count) => sum + count, 0);
  const used = visits.filter((count) => count > 0).length;
  if (!total) return { total, used, entropy: 0, effective: 0, maxOverMean: 0 };
  const entropy = visits.reduce((sum, count) => (count ? sum - (count / total) * Math.log2(count / total) : sum), 0);
  return { total, used, entropy, effective: 2 ** entropy, maxOverMean: (Math.max(...visits) * visits.length) / total };
}

/** The visits of each layer, from rows of `width`: a layer may have fewer experts than the widest. */
export function rowsOf(visits, layers, width) {
  return layers.map(({ experts }, place) => Array.from(visits.subarray(place * width, place * width + experts)));
}
