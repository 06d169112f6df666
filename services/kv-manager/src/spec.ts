/**
 * Owns comparing and naming attention specs.
 */
import type { AttentionSpec } from '@lamina/tensor';

export function sameSpec(a: AttentionSpec, b: AttentionSpec): boolean {
  return (
    a.numLayers === b.numLayers &&
    a.numHeads === b.numHeads &&
    a.numKvHeads === b.numKvHeads &&
    a.headDim === b.headDim &&
    a.scale === b.scale
  );
}

export function describeSpec(spec: AttentionSpec): string {
  return `${spec.numLayers} layers, ${spec.numHeads} heads, ${spec.numKvHeads} kv heads of ${spec.headDim}, scale ${Number(spec.scale.toPrecision(6))}`;
}
