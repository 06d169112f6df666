/**
 * Owns a worker thread: its ONNX Runtime session, its own NATS connection, its waves and the watch over them.
 *
 * Invariants
 * 1. Tensors go from the session to the connection on this thread; no other thread ever sees them.
 * 2. The watch runs only while a step is in flight: an idle worker does nothing.
 * 3. A step has failed for the executor when what it sent is on the server, or refused by the shards: after that its blocks may
 *    be given to others.
 */
import { parentPort, workerData } from 'node:worker_threads';
import { openTensorLink } from '@lamina/bus';
import {
  emptyFrameHeader,
  errorBodySchema,
  errorOf,
  FRAME_HEADER_BYTES,
  FRAME_KIND,
  parseMessage,
  readFrameHeader,
  SUBJECTS,
  unpackMessage,
} from '@lamina/protocol';
import { asLaminaError, LaminaError } from '@lamina/tensor';
import { KvLease } from '../kv-lease.ts';
import { compileLayerCycle } from '../request/layer-cycle.ts';
import { DenseSession } from './dense-session.ts';
import type { FromWorker, StepRequest, ToWorker, WorkerOptions } from './messages.ts';
import { NativeGuard } from './native-guard.ts';
import { Retraction } from './retraction.ts';
import { Turns } from './turns.ts';
import { Wave } from './wave.ts';

const port = parentPort;
if (port === null) throw new LaminaError('internal', 'this file is the entry of a worker thread');
const options: WorkerOptions = workerData;

const post = (message: FromWorker): void => port.postMessage(message);
const complain = (error: LaminaError): void => post({ kind: 'complaint', code: error.code, message: error.message });

const { link, fallbackReason } = await openTensorLink(
  {
    url: options.natsUrl,
    name: `dense-executor worker ${options.workerId}`,
    connectTimeoutMs: options.natsConnectTimeoutMs,
    access: options.natsAccess,
  },
  { onError: complain },
  options.tensorLink,
);
const guard = new NativeGuard(options.nativeGuard, options.workerIndex);
guard.enterLoading();
const session = await DenseSession.load(options, guard).finally(() => guard.leave());
const replySubjectOf = (wave: number | string, shardIndex: number | string): string =>
  SUBJECTS.workerTensors(options.workerId, wave, shardIndex);
const lease = new KvLease(options.lease);
let { originId } = options;
const layerCycle = compileLayerCycle();
/** A shard is not asked more often to confirm that a step is taken back. */
const MIN_SILENCE_MS = 1_000;
/** How soon it is looked again whether the connection is back. */
const FLUSH_RETRY_MS = 50;
const turns = new Turns();
const waves = Array.from(
  { length: options.numWaves },
  () =>
    new Wave({
      dims: options.dims,
      session,
      attentionThreads: options.intraOpThreads,
      link,
      layerCycle,
      originId,
      isBodyChecked: options.isBodyChecked,
      replySubjectOf,
      lease,
      turns,
    }),
);
const retraction = new Retraction({
  publish: (subject, data, reply) => link.publish(subject, data, reply),
  flush: () => link.flush(),
  replySubjectOf,
  onLate: (shardId) => post({ kind: 'late', shardIds: [shardId] }),
  silenceMs: Math.max(MIN_SILENCE_MS, options.gatherTimeoutMs / 5),
});
/** How often the connection was cut. */
let numCuts = 0;
let isStopping = false;

/** What a shard says went wrong; a failure that cannot be read is one as well. */
function readFailure(frame: Uint8Array): LaminaError {
  try {
    const body = unpackMessage(frame.subarray(FRAME_HEADER_BYTES));
    return errorOf(parseMessage('shard failure', errorBodySchema, body));
  } catch (cause) {
    return asLaminaError(cause);
  }
}

const header = emptyFrameHeader();
link.subscribe(replySubjectOf('*', '*'), (message) => {
  const { data } = message;
  if (data.length === 0) {
    const [wave, shardIndex] = message.subject.split('.').slice(-2).map(Number);
    waves[wave!]?.exchange.shardIsGone(shardIndex!);
    retraction.unheard(wave!, shardIndex!);
    return;
  }
  let damage: LaminaError | undefined;
  try {
    readFrameHeader(data, header);
  } catch (cause) {
    damage = asLaminaError(cause);
    complain(damage);
    if (header.kind === 0) return;
  }
  const wave = waves[header.waveIndex];
  if (header.originId !== originId || wave === undefined) return;
  if (damage !== undefined) wave.exchange.receiveFailure(header, damage);
  else if (header.kind === FRAME_KIND.partial) {
    if (!wave.exchange.receive(data, header)) retraction.receive(header);
  } else if (header.kind === FRAME_KIND.failure) {
    const failure = readFailure(data);
    if (failure.retryAfterMs === 0) runAllAgain(failure);
    else wave.exchange.receiveFailure(header, failure);
  }
});
/** What was under way may be lost, whichever step's it was; the KV is not. */
function runAllAgain(failure: LaminaError): void {
  for (const wave of waves) wave.exchange.fail(failure, []);
}
link.onStatus((status) => {
  if (status === 'disconnect') numCuts++;
  if (status === 'reconnect') runAllAgain(new LaminaError('unavailable', 'the connection to NATS was lost'));
});

/** A layer that waits longer makes its shards suspect. */
const LATE_AFTER_MS = 200;
const WATCH_MS = 100;

let numInFlight = 0;
let watch: NodeJS.Timeout | undefined;

/** A dense stage keeps this thread from its socket: a wave is late only if it still is when that has been read. */
function watchGathers(): void {
  const nowMs = performance.now();
  for (const wave of waves) {
    const { dispatchedAtMs } = wave.exchange;
    const waitedMs = nowMs - dispatchedAtMs;
    if (waitedMs > LATE_AFTER_MS) setImmediate(judgeLate, wave, dispatchedAtMs, waitedMs);
  }
}

function judgeLate({ exchange }: Wave, dispatchedAtMs: number, waitedMs: number): void {
  if (exchange.dispatchedAtMs !== dispatchedAtMs) return;
  const shardIds = exchange.waitingShardIds;
  if (waitedMs <= options.gatherTimeoutMs) {
    post({ kind: 'late', shardIds });
    return;
  }
  exchange.fail(
    new LaminaError('shard_lost', `no attention from ${shardIds.join(', ')} within ${options.gatherTimeoutMs} ms`),
    shardIds,
  );
}

/** When all that was published before is on the server, or lost with a connection that was cut. */
async function flushed(): Promise<void> {
  while (!link.isClosed) {
    try {
      await link.flush();
      return;
    } catch {
      await new Promise((resolve) => setTimeout(resolve, FLUSH_RETRY_MS));
    }
  }
}

async function runStep(step: StepRequest): Promise<void> {
  const wave = waves[step.waveIndex];
  if (wave === undefined) throw new LaminaError('internal', `no wave ${step.waveIndex}`);
  numInFlight++;
  watch ??= setInterval(watchGathers, Math.min(WATCH_MS, Math.max(5, options.gatherTimeoutMs / 4)));
  const numCutsBefore = numCuts;
  const stepOriginId = originId;
  const result = await wave.run(step);
  if (result.kind === 'stepFailed') {
    await flushed();
    // Another origin than the step's: the shards refuse the step's, and its blocks are free when they do. When this worker
    // stops, its executor leaves, and the kv-manager fences its origins.
    if (numCuts !== numCutsBefore && originId === stepOriginId && !isStopping)
      await retraction.retract(step, stepOriginId);
  }
  numInFlight--;
  if (numInFlight === 0) {
    clearInterval(watch);
    watch = undefined;
  }
  post(result);
}

function takeOrigin(newOriginId: number): void {
  originId = newOriginId;
  retraction.originEnded();
  for (const wave of waves) {
    wave.originId = newOriginId;
    // Its blocks are gone, and shards may refuse it without a word.
    wave.exchange.fail(new LaminaError('unavailable', 'the kv-manager had lost this executor'), []);
  }
}

async function stop(): Promise<void> {
  isStopping = true;
  clearInterval(watch);
  retraction.originEnded();
  await link.close();
  await Promise.all(waves.map((wave) => wave.close()));
  await session.release();
  port?.close();
}

port.on('message', (message: ToWorker) => {
  // A step that can neither end nor be taken back ends the worker, and so the executor: then its origins are fenced.
  if (message.kind === 'step') void runStep(message);
  else if (message.kind === 'origin') takeOrigin(message.originId);
  else if (message.kind === 'stop') void stop();
  else if (message.kind === 'abort') {
    const { waveIndex, stepId } = message;
    waves[waveIndex]?.exchange.abort(stepId);
  } else {
    retraction.shardLost(message.shardId);
    for (const wave of waves) {
      if (wave.exchange.usesShard(message.shardId)) {
        wave.exchange.fail(new LaminaError('shard_lost', `${message.shardId} went away`), [message.shardId]);
      }
    }
  }
});
// The connection may have been cut while the model was loaded.
await flushed();
post({ kind: 'ready', linkFallbackReason: fallbackReason });
