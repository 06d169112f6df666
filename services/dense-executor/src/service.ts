/**
 * Owns the start and stop of a dense-executor: model, workers, registration, the loop that leases work.
 */
import { ensureStreams, TokenStream, WorkQueue } from '@lamina/bus';
import { buildModel, loadTokenizer, logPull, readModel, resolveModel } from '@lamina/model';
import { SUBJECTS } from '@lamina/protocol';
import {
  hubVariables,
  natsAccessOf,
  processEnvironment,
  type RunningService,
  type ServiceContext,
} from '@lamina/runtime';
import { LaminaError } from '@lamina/tensor';
import { Executor } from './executor.ts';
import { KvClient } from './kv-client.ts';
import { KvLease } from './kv-lease.ts';
import { endUnreadable } from './lost-answer.ts';
import { ExecutorMetrics } from './metrics.ts';
import { Scheduler } from './scheduling/scheduler.ts';
import { WorkerPool } from './worker-pool.ts';

/** How long a stop waits for running requests before they go back to the queue: another then computes their KV anew. */
const DRAIN_TIMEOUT_MS = 2_000;
/** Well before a supervisor loses patience, though nats-server may not store what is handed back. */
const HAND_BACK_TIMEOUT_MS = 2_000;
/** One pull from the work queue waits so long; an idle executor asks once per that time, and what the server keeps back is found then. */
const LEASE_WAIT_MS = 10_000;

const sleep = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));

export async function startDenseExecutor(context: ServiceContext): Promise<RunningService> {
  const { bus, config, log, registry, instanceId, complain } = context;
  const modelDir = await resolveModel(config.model, {
    ...hubVariables(processEnvironment()),
    cacheDir: config.cacheDir,
    weights: config.onnxVariant,
    ...logPull(log),
  });
  const description = await readModel(modelDir, config.onnxVariant);
  const [tokenizer, built] = await Promise.all([
    loadTokenizer(modelDir),
    buildModel(modelDir, { cacheDir: config.cacheDir, weights: config.weights, variant: config.onnxVariant }),
    ensureStreams(bus),
  ]);
  // ONNX Runtime's RotaryEmbedding takes no more tokens at a time than its tables have positions.
  const maxBatchedTokens = Math.min(config.maxBatchedTokens, description.contextLength);
  const numWaves = config.denseWorkers * config.wavesPerWorker;
  const scheduler = new Scheduler({ ...config, maxBatchedTokens }, numWaves, config.denseWorkers);
  scheduler.shortSequences = description.shortSequences;
  const metrics = new ExecutorMetrics(registry, {
    running: () => executor.requests.size,
    waves: () => executor.steps.numInFlight,
  });
  const tokens = new TokenStream(bus, complain);
  const executor: Executor = new Executor({
    description,
    tokenizer,
    scheduler,
    tokens,
    metrics,
    log,
  });
  const lease = new KvLease();
  const pool = await WorkerPool.start(
    {
      numWorkers: config.denseWorkers,
      wavesPerWorker: config.wavesPerWorker,
      executorId: instanceId,
      worker: {
        natsUrl: config.natsUrl,
        natsConnectTimeoutMs: config.natsConnectTimeoutMs,
        natsAccess: natsAccessOf(config, 'dense-executor'),
        tensorLink: config.tensorLink,
        stagedGraphPath: built.stagedGraphPath,
        dataDir: built.dataDir,
        lease: lease.shared,
        intraOpThreads: config.intraOpThreads,
        gatherTimeoutMs: config.gatherTimeoutMs,
        isBodyChecked: config.tensorChecksum === 'all',
        dims: { ...description.attention, hiddenSize: description.hiddenSize, vocabSize: description.vocabSize },
      },
    },
    {
      onStepDone: (wave, result) => executor.steps.onStepDone(wave, result),
      onStepFailed: (wave, result) => executor.steps.onStepFailed(wave, result),
      onComplaint: complain,
      onLate: (shardIds) => {
        for (const shardId of shardIds) executor.tables.suspect(shardId);
      },
      onLinkFallback: (reason) => log.warn({ reason }, 'tensors travel over nats.js, which is slow'),
      onDeath: context.fail,
    },
  );
  const kv = new KvClient(
    {
      bus,
      executorId: instanceId,
      modelId: description.modelId,
      spec: description.attention,
      lease,
      origins: pool,
      requestTimeoutMs: config.requestTimeoutMs,
      log,
      fail: context.fail,
    },
    executor.tables,
  );
  const layout = await kv.register();
  executor.connect(kv, pool, layout);
  bus.subscribe(SUBJECTS.cancelAll, ({ subject }) => executor.cancel(subject.slice(subject.lastIndexOf('.') + 1)));
  log.info(
    {
      model: description.modelId,
      stages: description.numStages,
      weightBytes: built.weightBytes,
      workers: config.denseWorkers,
      waves: pool.numWaves,
      layout,
    },
    'model loaded',
  );

  let isStopping = false;
  const queue = new WorkQueue(bus);
  const endAnswer = (requestId: string, error: LaminaError): Promise<void> => endUnreadable(tokens, requestId, error);
  const leasing = async (): Promise<void> => {
    while (!isStopping) {
      await executor.requests.below(config.maxRunningRequests);
      if (isStopping) return;
      try {
        const lease = await queue.lease(LEASE_WAIT_MS, complain, endAnswer);
        if (lease === undefined) continue;
        if (isStopping) lease.release();
        else executor.admit(lease);
      } catch (cause) {
        if (isStopping) return;
        complain(new LaminaError('unavailable', 'the work queue gives nothing; trying again', { cause }));
        await sleep(1_000);
      }
    }
  };
  void leasing();

  return {
    stats: () => ({
      model: description.modelId,
      runningRequests: executor.requests.size,
      wavesInFlight: executor.steps.numInFlight,
      waves: pool.numWaves,
    }),
    stop: async () => {
      isStopping = true;
      await Promise.race([executor.requests.below(1), sleep(DRAIN_TIMEOUT_MS)]);
      await Promise.race([executor.handBack(), sleep(HAND_BACK_TIMEOUT_MS)]);
      await kv.stop();
      await pool.stop();
    },
  };
}
