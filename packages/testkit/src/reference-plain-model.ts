/**
 * Owns reading a checkpoint for the plain float64 forward passes: config.json's fields and the tensors by name.
 *
 * Invariants
 * 1. Values are exactly those of the file, in float64.
 */
import { add, multiply, type PlainTensor, type Rows, rmsNorm } from './reference-plain-math.ts';

/** Fields of config.json, as they are called there. */
export interface PlainConfig {
  readonly model_type: string;
  readonly hidden_size?: number;
  readonly num_hidden_layers?: number;
  readonly num_attention_heads?: number;
  readonly num_key_value_heads?: number;
  /** Absent: hidden_size / num_attention_heads. */
  readonly head_dim?: number;
  readonly max_position_embeddings?: number;
  readonly original_max_position_embeddings?: number;
  readonly rope_theta?: number;
  readonly rope_scaling?: PlainRope | null;
  readonly rope_parameters?: (PlainRope & PlainRopeOfKinds) | null;
  readonly rope_local_base_freq?: number;
  readonly partial_rotary_factor?: number;
  readonly no_rope_layers?: readonly number[] | null;
  readonly rms_norm_eps?: number;
  readonly hidden_act?: string;
  readonly tie_word_embeddings?: boolean;
  readonly sliding_window?: number | null;
  readonly use_sliding_window?: boolean;
  readonly max_window_layers?: number;
  readonly sliding_window_pattern?: number;
  readonly layer_types?: readonly string[] | null;
  readonly no_rope_layer_interval?: number;
  readonly query_pre_attn_scalar?: number;
  readonly attn_logit_softcapping?: number | null;
  readonly final_logit_softcapping?: number | null;
  /** GPT-2. */
  readonly n_layer?: number;
  readonly n_head?: number;
  readonly layer_norm_epsilon?: number;
}

/** The rope of each kind of layer, where `rope_parameters` says so. */
export interface PlainRopeOfKinds {
  readonly full_attention?: PlainRope;
  readonly sliding_attention?: PlainRope;
}

export interface PlainRope {
  readonly rope_type?: string;
  readonly type?: string;
  readonly rope_theta?: number;
  readonly factor?: number;
  readonly original_max_position_embeddings?: number;
  readonly low_freq_factor?: number;
  readonly high_freq_factor?: number;
  readonly attention_factor?: number;
  readonly beta_fast?: number;
  readonly beta_slow?: number;
  readonly mscale?: number;
  readonly mscale_all_dim?: number;
  readonly truncate?: boolean;
  readonly partial_rotary_factor?: number;
  readonly short_factor?: readonly number[];
  readonly long_factor?: readonly number[];
}

export class PlainModel {
  readonly config: PlainConfig;
  readonly #tensors: ReadonlyMap<string, PlainTensor>;
  readonly #root: string;

  constructor(config: PlainConfig, file: Buffer, root: string) {
    this.config = config;
    this.#tensors = readTensors(file);
    this.#root = root;
  }

  weight(name: string): PlainTensor {
    return this.#tensor(`${this.#root}${name}.weight`);
  }

  bias(name: string): Float64Array {
    return this.#tensor(`${this.#root}${name}.bias`).values;
  }

  headWeight(): PlainTensor {
    return this.#tensor('lm_head.weight');
  }

  /** W x + b, without b where the checkpoint has none. */
  linear(name: string, x: Float64Array): Float64Array {
    const y = multiply(this.weight(name), x);
    const bias = this.#tensors.get(`${this.#root}${name}.bias`);
    return bias === undefined ? y : add(y, bias.values);
  }

  norm(x: Float64Array, name: string): Float64Array {
    return rmsNorm(x, this.weight(name).values, this.config.rms_norm_eps!);
  }

  /** A norm whose gamma is stored less 1. */
  offsetNorm(x: Float64Array, name: string): Float64Array {
    const gamma = this.weight(name).values.map((value) => 1 + value);
    return rmsNorm(x, gamma, this.config.rms_norm_eps!);
  }

  embed(name: string, indices: readonly number[]): Rows {
    const { values, shape } = this.weight(name);
    const width = shape[1]!;
    return indices.map((index) => values.slice(index * width, (index + 1) * width));
  }

  #tensor(name: string): PlainTensor {
    const tensor = this.#tensors.get(name);
    if (tensor === undefined) throw new Error(`no tensor ${name}`);
    return tensor;
  }
}

function readTensors(file: Buffer): Map<string, PlainTensor> {
  const headerBytes = Number(file.readBigUInt64LE(0));
  const header: Record<string, { dtype: string; shape: number[]; data_offsets: [number, number] }> = JSON.parse(
    file.toString('utf8', 8, 8 + headerBytes),
  );
  const tensors = new Map<string, PlainTensor>();
  for (const [name, { dtype, shape, data_offsets: offsets }] of Object.entries(header)) {
    if (name === '__metadata__') continue;
    const data = file.subarray(8 + headerBytes + offsets[0], 8 + headerBytes + offsets[1]);
    const count = shape.reduce((a, b) => a * b, 1);
    tensors.set(name, { shape, values: new Float64Array(count).map((_, i) => element(data, dtype, i)) });
  }
  return tensors;
}

const word = Buffer.alloc(4);

function element(data: Buffer, dtype: string, i: number): number {
  if (dtype === 'F32') return data.readFloatLE(i * 4);
  const bits = data.readUInt16LE(i * 2);
  if (dtype === 'BF16') {
    word.writeUInt16LE(bits, 2);
    return word.readFloatLE(0);
  }
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  const magnitude = exponent === 0 ? fraction * 2 ** -24 : (1024 + fraction) * 2 ** (exponent - 25);
  return bits & 0x8000 ? -magnitude : magnitude;
}
