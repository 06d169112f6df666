/** NATS: the only package that imports the client library. */
export { AnswerWriter } from './answer-writer.ts';
export { Bus, type InstanceStats, type Subscription } from './bus.ts';
export type { BusEvents, BusMessage } from './bus-message.ts';
export { type BusOptions, type NatsAccess, redactUrl } from './connection.ts';
export type { ServiceDescription } from './micro-service.ts';
export { takeLinkCpuSeconds } from './native-socket.ts';
export { openTensorLink, TENSOR_LINK_KINDS, type TensorLinkKind } from './open-tensor-link.ts';
export { type DurablePrompt, type PromptAside, PromptQueue } from './prompt-queue.ts';
export { isForbiddenReply } from './reply-guard.ts';
export { ACK_WAIT_MS, ensureStreams } from './streams.ts';
export type { HeldMemory, LinkMessage, TensorLink } from './tensor-link.ts';
export { type StoredAnswer, type StoredEnd, TokenStream } from './token-stream.ts';
export { type WorkLease, WorkQueue } from './work-queue.ts';
