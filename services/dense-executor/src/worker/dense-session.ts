/**
 * Owns the ONNX Runtime session of the staged graph: all dense stages behind one `stage` input (design: one session,
 * a binary tree of If nodes, since one session per stage costs its own thread pool and memory each).
 *
 * Invariants
 * 1. Tensors that a stage does not read are fed as empty constants, made once.
 * 2. enableMemPattern is off: with varying shapes it grows native memory without bound.
 */
import { STAGED_INPUTS, STAGED_OUTPUTS } from '@lamina/model';
import { LaminaError } from '@lamina/tensor';
import { InferenceSession, Tensor } from 'onnxruntime-node';
import type { ModelDims, WorkerOptions } from './messages.ts';
import type { NativeGuard } from './native-guard.ts';
import type { LayerOutputs } from './stage-outputs.ts';

type SessionOptions = Pick<WorkerOptions, 'stagedGraphPath' | 'dataDir' | 'dims' | 'intraOpThreads'>;

const scalar = (value: number): Tensor => new Tensor('int64', BigInt64Array.of(BigInt(value)), []);

export class DenseSession {
  readonly #session: InferenceSession;
  readonly #guard: NativeGuard;
  readonly #dims: ModelDims;
  readonly #stages: readonly Tensor[];
  readonly #noTokens = new Tensor('int64', new BigInt64Array(0), [1, 0]);
  readonly #noRows = new Tensor('int64', new BigInt64Array(0), [0]);
  readonly #noHidden: Tensor;
  readonly #noAttention: Tensor;

  private constructor(session: InferenceSession, dims: ModelDims, guard: NativeGuard) {
    this.#session = session;
    this.#guard = guard;
    this.#dims = dims;
    this.#stages = Array.from({ length: dims.numLayers + 1 }, (_, stage) => scalar(stage));
    this.#noHidden = new Tensor('float32', new Float32Array(0), [1, 0, dims.hiddenSize]);
    this.#noAttention = new Tensor('float32', new Float32Array(0), [1, 0, dims.numHeads * dims.headDim]);
  }

  /** @throws LaminaError `model_invalid` when ONNX Runtime refuses the graph. */
  static async load(
    { stagedGraphPath, dataDir, dims, intraOpThreads }: SessionOptions,
    guard: NativeGuard,
  ): Promise<DenseSession> {
    try {
      const session = await InferenceSession.create(stagedGraphPath, {
        executionProviders: ['cpu'],
        intraOpNumThreads: intraOpThreads,
        interOpNumThreads: 1,
        enableMemPattern: false,
        graphOptimizationLevel: 'all',
        extra: {
          session: { intra_op: { allow_spinning: '0' }, model_external_initializers_file_folder_path: dataDir },
        },
      });
      return new DenseSession(session, dims, guard);
    } catch (cause) {
      const reason = cause instanceof Error ? cause.message : String(cause);
      throw new LaminaError(
        'model_invalid',
        `ONNX Runtime does not load ${stagedGraphPath}: ${reason}; delete it to have it built again`,
        { cause },
      );
    }
  }

  /** Stage 0: embedding and the first layer's QKV. */
  async embed(tokenIds: Tensor, positionIds: Tensor, into: LayerOutputs): Promise<LayerOutputs> {
    return this.#runLayer(0, tokenIds, positionIds, this.#noHidden, this.#noAttention, into);
  }

  /**
   * Stage `layer`, 1 .. numLayers - 1: output projection and MLP of the layer before, QKV of this one.
   * @param attention [1, numTokens, numHeads * headDim] gathered attention of the layer before.
   */
  async layer(
    layer: number,
    positionIds: Tensor,
    hidden: Tensor,
    attention: Tensor,
    into: LayerOutputs,
  ): Promise<LayerOutputs> {
    return this.#runLayer(layer, this.#noTokens, positionIds, hidden, attention, into);
  }

  async #runLayer(
    stage: number,
    tokenIds: Tensor,
    positionIds: Tensor,
    hidden: Tensor,
    attention: Tensor,
    into: LayerOutputs,
  ): Promise<LayerOutputs> {
    await this.#run(
      {
        [STAGED_INPUTS.stage.name]: this.#stages[stage]!,
        [STAGED_INPUTS.tokenIds.name]: tokenIds,
        [STAGED_INPUTS.positionIds.name]: positionIds,
        [STAGED_INPUTS.hidden.name]: hidden,
        [STAGED_INPUTS.attention.name]: attention,
        [STAGED_INPUTS.logitRows.name]: this.#noRows,
      },
      into.fetches,
    );
    return into;
  }

  /**
   * Last stage: output projection and MLP of the last layer, final norm and LM head, of the wanted rows only.
   * @param attention [1, numTokens, numHeads * headDim] gathered attention of the last layer.
   * @param rows [numRows] int64: rows of the wave.
   * @param into [numRows, vocabSize] float32
   */
  async logits(hidden: Tensor, attention: Tensor, rows: Tensor, into: Tensor): Promise<void> {
    await this.#run(
      {
        [STAGED_INPUTS.stage.name]: this.#stages[this.#dims.numLayers]!,
        [STAGED_INPUTS.tokenIds.name]: this.#noTokens,
        [STAGED_INPUTS.positionIds.name]: this.#noTokens,
        [STAGED_INPUTS.hidden.name]: hidden,
        [STAGED_INPUTS.attention.name]: attention,
        [STAGED_INPUTS.logitRows.name]: rows,
      },
      { [STAGED_OUTPUTS.logits.name]: into },
    );
  }

  async #run(feeds: Record<string, Tensor>, fetches: Readonly<Record<string, Tensor>>): Promise<void> {
    this.#guard.enter();
    try {
      await this.#session.run(feeds, fetches);
    } finally {
      this.#guard.leave();
    }
  }

  async release(): Promise<void> {
    this.#guard.enter();
    try {
      await this.#session.release();
    } finally {
      this.#guard.leave();
    }
  }
}
