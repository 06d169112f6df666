/**
 * Owns rotary embedding of the plain float64 forward passes: each way of scaling as modeling_rope_utils.py has it.
 *
 * Invariants
 * 1. `sequenceLength` is that of the whole sequence.
 */
import type { PlainConfig } from './reference-plain-model.ts';

export interface PlainRotation {
  /** Elements of a head that are rotated. */
  readonly dim: number;
  readonly inverseFrequencies: readonly number[];
  readonly attentionFactor: number;
}

export function ropeOf(config: PlainConfig, sequenceLength: number): PlainRotation {
  const rope = config.rope_scaling ?? config.rope_parameters ?? {};
  const type = rope.rope_type ?? rope.type ?? 'default';
  const base = rope.rope_theta ?? config.rope_theta!;
  const partial = rope.partial_rotary_factor ?? config.partial_rotary_factor ?? 1;
  const dim = Math.trunc(config.head_dim! * partial);
  const exponents = Array.from({ length: dim / 2 }, (_, i) => (2 * i) / dim);
  const inverse = exponents.map((exponent) => 1 / base ** exponent);
  const maxPositions = config.max_position_embeddings!;
  const original =
    config.original_max_position_embeddings ?? rope.original_max_position_embeddings ?? config.max_position_embeddings!;
  const result = (frequencies: number[], attentionFactor = 1): PlainRotation => ({
    dim,
    inverseFrequencies: frequencies,
    attentionFactor,
  });
  switch (type) {
    case 'default':
      return result(inverse);
    case 'linear':
      return result(inverse.map((value) => value / rope.factor!));
    case 'dynamic': {
      const length = Math.max(sequenceLength, maxPositions);
      const factor = rope.factor!;
      const grown = base * ((factor * length) / maxPositions - (factor - 1)) ** (dim / (dim - 2));
      return result(exponents.map((exponent) => 1 / grown ** exponent));
    }
    case 'llama3': {
      const lowWavelength = original / rope.low_freq_factor!;
      const highWavelength = original / rope.high_freq_factor!;
      return result(
        inverse.map((value) => {
          const wavelength = (2 * Math.PI) / value;
          if (wavelength > lowWavelength) return value / rope.factor!;
          if (wavelength < highWavelength) return value;
          const smooth =
            (original / wavelength - rope.low_freq_factor!) / (rope.high_freq_factor! - rope.low_freq_factor!);
          return ((1 - smooth) * value) / rope.factor! + smooth * value;
        }),
      );
    }
    case 'yarn': {
      const factor = rope.factor!;
      const correctionDim = (rotations: number): number =>
        (dim * Math.log(original / (rotations * 2 * Math.PI))) / (2 * Math.log(base));
      let [low, high] = [correctionDim(rope.beta_fast ?? 32), correctionDim(rope.beta_slow ?? 1)];
      if (rope.truncate !== false) [low, high] = [Math.floor(low), Math.ceil(high)];
      [low, high] = [Math.max(low, 0), Math.min(high, dim - 1)];
      if (low === high) high += 0.001;
      const frequencies = inverse.map((value, i) => {
        const extrapolation = 1 - Math.min(Math.max((i - low) / (high - low), 0), 1);
        return (value / factor) * (1 - extrapolation) + value * extrapolation;
      });
      const mscale = (m: number): number => 0.1 * m * Math.log(factor) + 1;
      const inferred =
        rope.mscale && rope.mscale_all_dim ? mscale(rope.mscale) / mscale(rope.mscale_all_dim) : mscale(1);
      return result(frequencies, rope.attention_factor ?? inferred);
    }
    case 'longrope':
    case 'su': {
      const factors = sequenceLength > original ? rope.long_factor! : rope.short_factor!;
      const factor = maxPositions / original;
      const inferred = factor <= 1 ? 1 : Math.sqrt(1 + Math.log(factor) / Math.log(original));
      const frequencies = exponents.map((exponent, i) => 1 / (factors[i]! * base ** exponent));
      return result(frequencies, rope.attention_factor ?? inferred);
    }
    default:
      throw new Error(`no rope of type ${type}`);
  }
}

/** Rotates pairs (i, i + dim / 2) of every head; what is beyond `dim` stays. */
export function rotate(x: Float64Array, position: number, rope: PlainRotation, headDim: number): Float64Array {
  const y = x.slice();
  const half = rope.dim / 2;
  for (let head = 0; head < x.length; head += headDim) {
    for (let i = 0; i < half; i++) {
      const angle = position * rope.inverseFrequencies[i]!;
      const cos = Math.cos(angle) * rope.attentionFactor;
      const sin = Math.sin(angle) * rope.attentionFactor;
      const [a, b] = [x[head + i]!, x[head + i + half]!];
      y[head + i] = a * cos - b * sin;
      y[head + i + half] = b * cos + a * sin;
    }
  }
  return y;
}
