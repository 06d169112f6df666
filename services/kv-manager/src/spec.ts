/**
 * Owns naming attention specs, for people.
 */
import type { AttentionSpec } from '@lamina/tensor';

export function describeSpec(spec: AttentionSpec): string {
  const { numLayers, numHeads, numKvHeads, headDim, scale, softcap, windowTokens, sinkLogits, alibiSlopes } = spec;
  const parts = [
    `${numLayers} layers, ${numHeads} heads, ${numKvHeads} kv heads of ${headDim}, scale ${Number(scale.toPrecision(6))}`,
  ];
  if (softcap !== undefined) parts.push(`soft-cap ${softcap}`);
  if (windowTokens !== undefined) parts.push(`windows ${[...new Set(windowTokens)].join('/')}`);
  if (sinkLogits !== undefined) parts.push('sinks');
  if (alibiSlopes !== undefined) parts.push('ALiBi');
  return parts.join(', ');
}
