/** All that one service knows of another: subjects, messages, tensor frames and their bounds. */
export { packMessage, unpackMessage } from './codec.ts';
export * from './frame.ts';
export {
  checkGenerateRequest,
  encodingOf,
  type GenerateRequest,
  generateRequestSchema,
  type ParsedGenerateBody,
  parseGenerateBody,
  requestIdOf,
  type WireEncoding,
} from './generate-request.ts';
export type {
  BlockRef,
  ExecutorHeartbeat,
  ExecutorHeartbeatReply,
  FenceNotice,
  KvStatus,
  ShardHeartbeat,
  ShardHeartbeatReply,
} from './kv-messages.ts';
export { LIMITS } from './limits.ts';
export { CLOCK_TOLERANCE_MS, PastCancels } from './past-cancels.ts';
export { inboxPrefixOf, type Permissions, permissionsOf, ROLES, type Role } from './permissions.ts';
export {
  describeIssues,
  type ErrorBody,
  errorBodyOf,
  errorBodySchema,
  errorOf,
  idSchema,
  parseMessage,
} from './schema.ts';
export * from './step-plan.ts';
export {
  ENDPOINTS,
  type Endpoint,
  EVENTS,
  type EventSubject,
  GATEWAY_QUEUE,
  SERVICE_NAMES,
  type ServiceName,
  STREAMS,
  SUBJECT_NOTES,
  SUBJECTS,
} from './subjects.ts';
export {
  DELIVERY_HEADER,
  decodeTokens,
  encodeTokens,
  FINAL_HEADER,
  type FinishReason,
  storedEncodingOf,
  TOKENS_HEADER,
  type TokenMessage,
} from './token-message.ts';
export { type Sampling, type WorkItem, workItemSchema } from './work-item.ts';
