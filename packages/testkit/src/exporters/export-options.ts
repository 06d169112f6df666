/**
 * Owns the forms in which decoders are published, as options. docs/models.md says which real exports each stands for.
 */
import type { Precision } from './graph-maker.ts';

export type ExportForm =
  /** com.microsoft GroupQueryAttention. */
  | {
      readonly operator: 'gqa';
      readonly packed?: boolean;
      /** Where rotary embedding is: in the operator, or a node before it. */
      readonly rotary?: 'inside' | 'interleaved' | 'before' | 'partial';
      /**
       * longrope: an If takes other tables for requests of more tokens than that. `by`: what the condition asks, or how
       * the choice is written where no If is to be (`positions`: joined tables, an offset for long requests).
       */
      readonly longAbove?: { readonly tokens: number; readonly by: 'length' | 'tokens' | 'positions' };
      readonly localWindow?: number;
      readonly softcap?: number;
      readonly scale?: number;
      readonly sinks?: 'smooth' | 'head';
    }
  /** com.microsoft MultiHeadAttention after RotaryEmbedding; `joined`: the cache is joined and repeated before it. */
  | { readonly operator: 'mha'; readonly joined?: boolean }
  /**
   * ai.onnx Attention of opset 23, its inputs of rank 3 or 4; `joined`: the cache is joined before it. `indexed`: a
   * Boolean mask whose padding is looked up by batch and key, as transformers writes it since 4.53.
   */
  | {
      readonly operator: 'onnx';
      readonly rank: 3 | 4;
      readonly mask: 'causal' | 'bool' | 'float' | 'indexed';
      readonly joined?: boolean;
    }
  /** Written out, as torch.onnx.export traces it. */
  | {
      readonly operator: 'eager';
      /** `mul`: scores are scaled. `sdpa`: Q and K are, each by the root. */
      readonly scaling: 'mul' | 'sdpa';
      readonly mask: 'add' | 'where';
      readonly window?: number;
      readonly softcap?: number;
      readonly alibi?: boolean;
    }
  /** GPT-2: com.microsoft Attention with a packed past, or written out. */
  | { readonly operator: 'gpt2'; readonly fused: boolean; readonly merged?: boolean };

export interface ExportOptions {
  readonly form: ExportForm;
  readonly precision: Precision;
  readonly numLayers: number;
  readonly hiddenSize: number;
  readonly intermediateSize: number;
  readonly numHeads: number;
  readonly numKvHeads: number;
  readonly headDim: number;
  readonly vocabSize: number;
  readonly contextLength: number;
  /** `parallel`: attention and MLP of one norm side by side. `embedding`: the embedding is added in every layer. */
  readonly residual: 'plain' | 'parallel' | 'embedding';
  /** The LM head is the embedding. */
  readonly tied: boolean;
  /** Weights in `model.onnx_data` beside the graph. */
  readonly externalData: boolean;
  readonly seed: number;
}

export const EXPORT_DEFAULTS: Omit<ExportOptions, 'form'> = {
  precision: 'fp32',
  numLayers: 3,
  hiddenSize: 64,
  intermediateSize: 96,
  numHeads: 4,
  numKvHeads: 2,
  headDim: 16,
  vocabSize: 264,
  contextLength: 256,
  residual: 'plain',
  tied: false,
  externalData: false,
  seed: 1,
};
