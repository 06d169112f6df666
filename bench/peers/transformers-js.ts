/**
 * Owns transformers.js: the same shape as a published q4 decoder with GroupQueryAttention, greedy `generate` of a batch.
 *
 * Invariants
 * 1. `generate` cannot be paused, so a window is a whole call, its prompts included; time is taken between the tokens of
 *    the window only.
 */
import { mkdir, stat } from 'node:fs/promises';
import { join } from 'node:path';
import { AutoModelForCausalLM, env, type PreTrainedModel, StoppingCriteria, Tensor } from '@huggingface/transformers';
import { writeExport } from '@lamina/testkit';
import { shapeOf } from '../models.ts';
import { type Contestant, type Opened, promptOf, WARM_UP_STEPS, type WindowLimits, type Workload } from './peer.ts';

/** Asked after each token of the batch whether it was the last, which it never was. */
class StepClock extends StoppingCriteria {
  readonly timesMs: number[] = [];

  override _call(inputIds: readonly unknown[]): boolean[] {
    this.timesMs.push(performance.now());
    return inputIds.map(() => false);
  }
}

export class TransformersJsPeer implements Contestant {
  readonly name = 'transformers.js';
  #model: PreTrainedModel | undefined;
  #inputs: Record<string, Tensor> = {};
  #numRequests = 0;
  #contextTokens = 0;

  async open({ model, directory, numRequests, contextTokens, threads }: Workload): Promise<Opened> {
    const { shape } = shapeOf(model);
    const root = join(directory, 'published');
    const target = join(root, model);
    if ((await stat(join(target, 'config.json')).catch(() => undefined)) === undefined) {
      await mkdir(root, { recursive: true });
      await writeExport(
        target,
        { operator: 'gqa', rotary: 'inside' },
        { ...shape, precision: 'q4', externalData: true, contextLength: 2048, residual: 'plain', seed: 1 },
      );
    }
    env.allowRemoteModels = false;
    env.localModelPath = `${root}/`;
    this.#model ??= await AutoModelForCausalLM.from_pretrained(model, {
      local_files_only: true,
      device: 'cpu',
      dtype: 'q4',
      use_external_data_format: true,
      session_options: { intraOpNumThreads: threads, interOpNumThreads: 1 },
    });
    const prompts = Array.from({ length: numRequests }, (_, i) => promptOf(i, contextTokens, shape.vocabSize));
    const dims = [numRequests, contextTokens];
    this.#inputs = {
      input_ids: new Tensor('int64', BigInt64Array.from(prompts.flat(), BigInt), dims),
      attention_mask: new Tensor('int64', new BigInt64Array(numRequests * contextTokens).fill(1n), dims),
    };
    this.#numRequests = numRequests;
    this.#contextTokens = contextTokens;
    return { promptTokensPerSecond: null, held: 'prompts are computed in every window' };
  }

  async window({ minSteps }: WindowLimits): Promise<number> {
    const clock = new StepClock();
    const numNewTokens = WARM_UP_STEPS + minSteps + 1;
    const generated = await this.#model?.generate({
      ...this.#inputs,
      max_new_tokens: numNewTokens,
      do_sample: false,
      eos_token_id: -1,
      stopping_criteria: clock,
    });
    const width = generated instanceof Tensor ? generated.dims[1] : undefined;
    if (width !== this.#contextTokens + numNewTokens || clock.timesMs.length < numNewTokens)
      throw new Error(`transformers.js gave ${width} tokens in ${clock.timesMs.length} steps`);
    const seconds = (clock.timesMs.at(-1)! - clock.timesMs.at(-1 - minSteps)!) / 1000;
    return (minSteps * this.#numRequests) / seconds;
  }

  close(): Promise<void> {
    this.#inputs = {};
    return Promise.resolve();
  }

  async dispose(): Promise<void> {
    await this.#model?.dispose();
  }
}
