// ==UserScript==
// @name         Segment Anything 2: Tracker for CVAT
// @namespace    sam2-cvat-tracker
// @version      1.0.0
// @description  Tracks objects with a tracker function from CVAT's "Run annotation action" window
// @match        http://localhost:8080/*
// @run-at       document-end
// @grant        none
// ==/UserScript==

// Adds an action for each tracker function of the server to CVAT's "Run annotation action" window.
// README.md in this folder tells how to load it (as a user script: put your CVAT's address into
// @match above). It needs no build step and no other file.
//
// Sections: CVAT's data, constants, the action, frames and objects, tracking, calling the function,
// results as tracks (the keyframe rules), results as shapes (one per frame), geometry, messages,
// CVAT's page, registration.

'use strict';

(() => {
    // ------------------------------------------------------------------ CVAT's data

    /** @typedef {{spec_id: number | string, value: string}} Attribute */

    /**
     * The position of an object on one frame; a track is a list of them.
     * @typedef {object} Keyframe
     * @property {string} type
     * @property {number} frame
     * @property {number[]} points as CVAT writes them
     * @property {number} [rotation] degrees
     * @property {boolean} occluded
     * @property {boolean} outside
     * @property {number} z_order
     * @property {Attribute[]} attributes in a track: mutable ones only, each in force from here on
     * @property {number} [id]
     */

    /**
     * The fields that shapes and tracks of a collection share. CVAT wants `clientID` on what is
     * deleted, and neither `clientID` nor `id` on what is created.
     * @typedef {object} CommonFields
     * @property {number} frame
     * @property {number} label_id
     * @property {number} group 0: none
     * @property {string} source
     * @property {Attribute[]} attributes
     * @property {number} [clientID]
     * @property {number} [id]
     * @property {object[]} [elements]
     */

    /** @typedef {CommonFields & Keyframe} Shape */
    /** @typedef {CommonFields & {shapes: Keyframe[]}} Track */
    /** @typedef {{clientID: number}} Deleted CVAT finds what to delete by this alone */
    /** @typedef {{shapes: Shape[], tracks: Track[], tags: object[]}} Collection */

    /**
     * An object as CVAT shows it on one frame, interpolated where it has no keyframe.
     * @typedef {object} ObjectState
     * @property {number} clientID
     * @property {'shape' | 'track' | 'tag'} objectType
     * @property {string} shapeType
     * @property {number[]} points
     * @property {number} [rotation]
     * @property {boolean} occluded
     * @property {boolean} [outside]
     * @property {boolean} hidden
     * @property {boolean} lock
     * @property {number} zOrder
     * @property {string} source
     * @property {{id?: number} | null} [group]
     * @property {{id?: number, name?: string,
     *     attributes?: {id: number, mutable: boolean}[]}} [label]
     */

    /**
     * A job, or a task that is open outside a job (it has no `taskId`).
     * @typedef {object} Session
     * @property {number} id
     * @property {number} [taskId]
     * @property {number} [startFrame]
     * @property {number} [stopFrame]
     * @property {number} [size]
     * @property {{frameNumbers?: () => Promise<number[]>,
     *     get?: (frame: number) => Promise<{deleted?: boolean}>}} frames
     * @property {{get: (frame: number, allTracks: boolean, filters: object[]) =>
     *     Promise<ObjectState[]>, export?: () => Promise<Collection>}} annotations
     */

    /** @typedef {{number: number, width: number, height: number}} FrameData */
    /** @typedef {{collection: Collection, frameData: FrameData}} FilterInput */
    /**
     * @typedef {FilterInput & {onProgress: (text: string, percent: number) => void,
     *     cancelled: () => boolean}} RunInput
     */

    /** @typedef {{type: string, points: number[]}} TrackerShape as the function takes it */
    /** @typedef {{shapes?: unknown, states?: unknown}} Answer */
    /**
     * @typedef {{id: string, name: string, kind: string, supportedShapeTypes?: string[]}} Model
     */

    /**
     * CVAT's client core, `globalThis.cvat`. Early versions cannot unregister actions.
     * @typedef {object} Core
     * @property {{BaseCollectionAction: new () => object}} classes
     * @property {{register: (action: object) => Promise<void>,
     *     unregister?: (action: object) => Promise<void>,
     *     list: () => Promise<{name: string}[]>}} actions
     * @property {{list: () => Promise<{models: Model[]}>,
     *     call: (taskId: number, model: Model, body: object) => Promise<Answer>}} lambda
     */

    /**
     * What CVAT's UI gives its plugins (`globalThis.cvatUI.registerComponent`). The last parameter
     * of `changeFrameAsync` makes it read a frame again that is shown already.
     * @typedef {object} PluginTools
     * @property {(action: unknown) => unknown} dispatch
     * @property {{changeFrameAsync: (frame: number, fillBuffer?: boolean, frameStep?: number,
     *     forceUpdate?: boolean) => unknown}} actionCreators
     * @property {{getState: () => {annotation: {job: {instance: {id: number} | null},
     *     player: {frame: {number: number}}}}}} store
     */

    // ------------------------------------------------------------------ constants

    const TARGET = 'Target frame';
    const CONVERT = 'Convert polygon shapes to tracks';
    const INTERVAL = 'Keyframe every N frames';
    const MADE_BY_TRACKING = 'semi-auto'; // CVAT's `source` of what a person and a model made

    const LOG_PREFIX = 'SAM 2 tracker:';
    const RETRY_PAUSES_MS = [1000, 3000, 9000]; // after a 503 or a network error
    const POLL_MS = 250; // how often a pause checks whether the annotator has cancelled
    const CORE_WAIT_MS = 60_000; // how long the page may take to load CVAT's core
    const ADDRESS_CHECK_MS = 1000; // how often the page's address is checked
    const LIST_AGAIN_MS = 60_000; // between two requests for the list of functions
    const LIST_RETRY_MS = 10_000; // the same after a request that failed

    // What annotators read of a failed call, by HTTP status; `explainError` has the other statuses.
    // 0: the browser got no answer from CVAT's server.
    const REASONS = new Map([
        [0, 'the server does not answer'],
        [401, 'CVAT refused the request: log in again'],
        [403, 'CVAT refused the request: you may not run this function'],
        [404, 'the function was not found'],
        [408, 'the function took too long'],
        [409, 'the tracking state does not fit: the model or the frame size has changed'],
        [410, 'the tracking state has expired'],
        [413, 'the request is too large: track fewer objects at a time'],
        [422, 'the function cannot read the image of the frame'],
        [429, 'the server is busy'],
        [502, 'the function does not answer'],
        [503, 'the function does not answer'],
        [504, 'the function took too long'],
    ]);
    const MAX_DETAILS = 2000; // characters of a failed call's text
    const MAX_LISTED = 5; // objects that a notice names

    /** Thrown to leave a pause when the annotator has pressed Cancel. */
    class Cancelled extends Error {}

    /** Thrown for an answer of the function that cannot be used. */
    class BadAnswer extends Error {}

    // ------------------------------------------------------------------ the action

    /**
     * @param {Core} core
     * @param {string} name as the window lists it
     * @param {() => Model | undefined} findModel the function, as the server listed it last
     */
    function createAction(core, name, findModel) {
        /** @type {{session: Session, parameters: Record<string, unknown>} | null} */
        let prepared = null;
        let largestGroup = 0;
        let isSingle = false;
        let cancelled = () => false;
        const supportedTypes = () => supportedTypesOf(findModel());

        class TrackerAction extends core.classes.BaseCollectionAction {
            get name() {
                return name;
            }

            get parameters() {
                return createParameters();
            }

            /**
             * @param {Session} session
             * @param {Record<string, unknown>} parameters
             */
            async init(session, parameters) {
                prepared = { session, parameters };
                cancelled = () => false;
            }

            /** CVAT calls this after it has committed the result. */
            async destroy() {
                const session = prepared?.session;
                prepared = null;
                if (session && cancelled()) {
                    refreshFrame(session);
                }
            }

            /** @param {FilterInput} input */
            applyFilter({ collection, frameData }) {
                largestGroup = findLargestGroup(collection);
                isSingle = Object.values(collection).flat().length === 1;
                return selectTrackable(collection, frameData.number, supportedTypes());
            }

            /** @param {ObjectState} state */
            isApplicableForObject(state) {
                return isTrackable(state, supportedTypes());
            }

            /** @param {RunInput} input */
            async run(input) {
                removeNotice();
                const model = findModel();
                if (!model || !prepared) {
                    throw new Error(`${name}: the server no longer lists this function.`);
                }
                cancelled = input.cancelled;
                return trackAndCollect({ core, model, largestGroup, isSingle, ...prepared, input });
            }
        }
        return new TrackerAction();
    }

    function createParameters() {
        /** @param {{instance: Session}} context */
        const limits = ({ instance }) => [...frameRange(instance), 1].map(String);
        return {
            [TARGET]: {
                type: 'number',
                values: limits,
                /** @param {{instance: Session}} context */
                defaultValue: ({ instance }) => String(frameRange(instance)[1]),
            },
            [CONVERT]: { type: 'checkbox', values: ['true', 'false'], defaultValue: 'true' },
            [INTERVAL]: { type: 'number', values: ['1', '1000', '1'], defaultValue: '1' },
        };
    }

    /**
     * @typedef {object} RunContext
     * @property {Core} core
     * @property {Model} model
     * @property {Session} session
     * @property {Record<string, unknown>} parameters
     * @property {number} largestGroup
     * @property {boolean} isSingle whether CVAT passed one object only, of all in the job
     * @property {RunInput} input
     * @property {number} [percent] last reported progress
     */

    /**
     * Run the action: choose, track, and return what CVAT is to create and to delete.
     * @param {RunContext} context
     */
    async function trackAndCollect(context) {
        const { session, parameters, input } = context;
        const current = input.frameData.number;
        const target = readTarget(session, parameters[TARGET], current);
        const convert = String(parameters[CONVERT]) === 'true';
        const interval = Math.max(1, Math.round(Number(parameters[INTERVAL])) || 1);
        const frameNumbers = await listFrames(session);
        const frames = await framesToTrack(session, frameNumbers, current, target);
        const objects = await chooseObjects(session, input, convert);

        const others = await countOthers(context);

        const outcome = await trackFrames(context, objects, current, frames);
        const { trackedFrames, failure } = outcome;
        if (failure) {
            console.warn(LOG_PREFIX, failure.message, failure.details ?? '');
        }
        if (failure && !trackedFrames.length) {
            throw new Error(`${failure.message} Nothing was changed.`);
        }
        const result = createEmptyResult();
        if (trackedFrames.length) {
            const last = trackedFrames[trackedFrames.length - 1];
            const nextFrame = await firstFrameAfter(session, frameNumbers, Math.max(current, last));
            addTracks(objects.filter(({ asTrack }) => asTrack), interval, nextFrame, result);
            await addShapes(context, objects, trackedFrames, result);
        }
        showNotice(context.model.name, describeOutcome(outcome, objects, current, others));
        return result;
    }

    /** @typedef {ReturnType<typeof createEmptyResult>} ActionResult */

    function createEmptyResult() {
        return {
            /** @type {Collection} */
            created: { shapes: [], tracks: [], tags: [] },
            /** @type {{shapes: Deleted[], tracks: Deleted[], tags: Deleted[]}} */
            deleted: { shapes: [], tracks: [], tags: [] },
        };
    }

    /**
     * @param {ActionResult} result
     * @param {TrackedObject} object
     */
    function deleteOriginal({ deleted }, { original }) {
        const list = 'shapes' in original ? deleted.tracks : deleted.shapes;
        list.push({ ...original, clientID: Number(original.clientID) });
    }

    // ------------------------------------------------------------------ frames and objects

    /**
     * @param {Session} session
     * @returns {[number, number]} first and last frame
     */
    function frameRange(session) {
        return session.taskId === undefined // a task's own start and stop are the video file's
            ? [0, (session.size ?? 1) - 1]
            : [session.startFrame ?? 0, session.stopFrame ?? 0];
    }

    /**
     * @param {Session} session
     * @param {unknown} value the parameter; CVAT remembers it from one job to the next
     * @param {number} current
     */
    function readTarget(session, value, current) {
        const [first, last] = frameRange(session);
        const number = Number(value ?? NaN);
        const target = Number.isFinite(number) ? number : last;
        if (target < first || target > last) {
            throw new Error(
                `${TARGET} ${target} is not in this job: choose one from ${first} to ${last}.`,
            );
        }
        if (target === current) {
            throw new Error(
                `${TARGET} is the current frame, ${current}: nothing to do. Choose a later frame, `
                + 'or an earlier one to track backwards.',
            );
        }
        return target;
    }

    /**
     * @param {Session} session
     * @returns {Promise<number[]>} ascending, with deleted frames
     */
    async function listFrames(session) {
        const [first, last] = frameRange(session);
        const numbers = await session.frames.frameNumbers?.()
            ?? Array.from({ length: last - first + 1 }, (_, i) => first + i);
        return [...numbers].sort((a, b) => a - b);
    }

    /**
     * @param {Session} session
     * @param {number} frame
     */
    async function isDeletedFrame(session, frame) {
        return Boolean((await session.frames.get?.(frame))?.deleted);
    }

    /**
     * @param {Session} session
     * @param {number[]} frameNumbers ascending
     * @param {number} current
     * @param {number} target
     * @returns {Promise<number[]>} in tracking order, without the current and deleted frames
     */
    async function framesToTrack(session, frameNumbers, current, target) {
        const candidates = target > current
            ? frameNumbers.filter((frame) => frame > current && frame <= target)
            : frameNumbers.filter((frame) => frame < current && frame >= target).reverse();
        const frames = [];
        for (const frame of candidates) {
            if (!await isDeletedFrame(session, frame)) {
                frames.push(frame);
            }
        }
        if (!frames.length) {
            throw new Error(`Every frame between ${current} and ${target} is deleted.`);
        }
        return frames;
    }

    /**
     * @param {Session} session
     * @param {number[]} frameNumbers ascending
     * @param {number} last
     * @returns {Promise<number | undefined>} the next frame that is not deleted
     */
    async function firstFrameAfter(session, frameNumbers, last) {
        for (const frame of frameNumbers.filter((number) => number > last)) {
            if (!await isDeletedFrame(session, frame)) {
                return frame;
            }
        }
        return undefined;
    }

    /**
     * @param {Collection} collection
     * @param {number} frame
     * @param {Set<string>} types
     * @returns {Collection} the objects of these types that are visible on this frame
     */
    function selectTrackable(collection, frame, types) {
        return {
            shapes: collection.shapes.filter((shape) => (
                shape.frame === frame && types.has(shape.type)
            )),
            tracks: collection.tracks.filter((track) => (
                types.has(track.shapes[0]?.type) && !isOutside(sortByFrame(track.shapes), frame)
            )),
            tags: [],
        };
    }

    /** @param {ObjectState} state */
    function isVisibleAndUnlocked(state) {
        return !state.hidden && !state.lock && !state.outside;
    }

    /**
     * @param {ObjectState} state
     * @param {Set<string>} types
     */
    function isTrackable(state, types) {
        return state.objectType !== 'tag' && types.has(state.shapeType)
            && isVisibleAndUnlocked(state);
    }

    /** @param {Model} [model] */
    function supportedTypesOf(model) {
        return new Set(model?.supportedShapeTypes ?? ['rectangle']);
    }

    /**
     * @param {RunContext} context
     * @returns {Promise<number>} how many objects of the frame CVAT left out, because it runs the
     *     action on the activated object alone
     */
    async function countOthers({ session, input, model, isSingle }) {
        const states = isSingle
            ? await session.annotations.get(input.frameData.number, false, []) : [];
        const types = supportedTypesOf(model);
        return Math.max(0, states.filter((state) => isTrackable(state, types)).length - 1);
    }

    /**
     * The position of an object on a tracked frame. Where it is not visible, the points are the
     * last known ones.
     * @typedef {{frame: number, points: number[], visible: boolean}} Position
     */

    /**
     * An object that is being tracked.
     * @typedef {object} TrackedObject
     * @property {Shape | Track} original what the annotator had
     * @property {string} label
     * @property {Keyframe[]} originalKeyframes ascending; a shape has one
     * @property {string} type
     * @property {boolean} asTrack whether the result is a track, else one shape per frame
     * @property {Keyframe} start its keyframe on the current frame
     * @property {Position[]} positions in tracking order
     * @property {{frame: number, shape: TrackerShape}} lastSeen
     * @property {Set<string>} mutableIds of the attributes that may change from frame to frame
     */

    /**
     * @param {Session} session
     * @param {RunInput} input
     * @param {boolean} convert whether shapes (not masks) become tracks
     * @returns {Promise<TrackedObject[]>}
     */
    async function chooseObjects(session, input, convert) {
        const { collection, frameData } = input;
        const states = new Map(
            (await session.annotations.get(frameData.number, false, []))
                .map((state) => [state.clientID, state]),
        );
        const objects = [];
        for (const original of [...collection.shapes, ...collection.tracks]) {
            const state = states.get(Number(original.clientID));
            if (state && isVisibleAndUnlocked(state)) {
                objects.push(createTrackedObject(original, state, frameData.number, convert));
            }
        }
        if (!objects.length) {
            throw new Error(
                `No object to track on frame ${frameData.number}: draw one, or show and unlock it.`,
            );
        }
        return objects;
    }

    /**
     * @param {Shape | Track} original
     * @param {ObjectState} state the object on the current frame
     * @param {number} frame
     * @param {boolean} convert
     * @returns {TrackedObject}
     */
    function createTrackedObject(original, state, frame, convert) {
        const mutableIds = new Set((state.label?.attributes ?? [])
            .filter((attribute) => attribute.mutable).map((attribute) => String(attribute.id)));
        const isTrack = 'shapes' in original;
        const type = isTrack ? original.shapes[0].type : original.type;
        const originalKeyframes = isTrack
            ? sortByFrame(original.shapes).map(withoutId)
            : [shapeToKeyframe(original, mutableIds)];
        const start = originalKeyframes.find((keyframe) => keyframe.frame === frame) ?? {
            type,
            frame,
            points: state.points,
            rotation: state.rotation ?? 0,
            occluded: state.occluded,
            outside: false,
            z_order: state.zOrder,
            attributes: [],
        };
        return {
            original,
            label: state.label?.name ?? 'object',
            originalKeyframes,
            type,
            asTrack: isTrack || (convert && type !== 'mask'),
            start,
            positions: [],
            lastSeen: { frame, shape: { type, points: uprightExtent(start) } },
            mutableIds,
        };
    }

    // ------------------------------------------------------------------ tracking

    /**
     * @typedef {object} Outcome
     * @property {number[]} trackedFrames in tracking order
     * @property {number} seconds
     * @property {boolean} cancelled
     * @property {number} [cancelledAt] the frame that would have been next
     * @property {{message: string, details?: string}} [failure] why tracking stopped early
     * @property {string} [malformed] where the first malformed shape was
     */

    /**
     * Track the objects, one request a frame for all of them, until done, cancelled or failed.
     * @param {RunContext} context
     * @param {TrackedObject[]} objects get the positions
     * @param {number} current
     * @param {number[]} frames in tracking order
     */
    async function trackFrames(context, objects, current, frames) {
        /** @type {Outcome} */
        const outcome = { trackedFrames: [], seconds: 0, cancelled: false };
        const { onProgress, cancelled } = context.input;
        const count = countOf(objects.length, 'object');
        const startedAt = performance.now();
        const elapsed = () => (performance.now() - startedAt) / 1000;
        let frame = current;
        try {
            onProgress(`Frame ${current} · starting ${count}`, 0);
            let states = await startTracking(context, current, objects);
            for (frame of frames) {
                if (cancelled()) {
                    throw new Cancelled();
                }
                const answer = await trackFrame(context, objects, frame, states);
                states = answer.states;
                objects.forEach((object, i) => {
                    if (!recordPosition(object, frame, answer.shapes[i])) {
                        outcome.malformed ??= `Frame ${frame}: the function's ${object.type} was `
                            + 'malformed and is left out.';
                    }
                });
                outcome.trackedFrames.push(frame);
                const done = outcome.trackedFrames.length;
                const seconds = elapsed() / done;
                context.percent = Math.floor((100 * done) / frames.length); // CVAT prints all digits
                onProgress(
                    `Frame ${frame} (${done} of ${frames.length}) · ${count} · `
                    + `${seconds.toFixed(1)} s/frame · `
                    + `${formatDuration(seconds * (frames.length - done))} left`,
                    context.percent,
                );
            }
        } catch (error) {
            if (error instanceof Cancelled) {
                outcome.cancelledAt = frame;
            } else {
                outcome.failure = {
                    message: `Frame ${frame} failed: ${explainError(error)}.`,
                    details: rawText(error),
                };
            }
        }
        outcome.seconds = elapsed();
        outcome.cancelled = cancelled();
        return outcome;
    }

    /**
     * Start objects on a frame from the shapes they were last seen with.
     * @param {RunContext} context
     * @param {number} frame
     * @param {TrackedObject[]} objects
     * @returns {Promise<unknown[]>} states
     */
    async function startTracking(context, frame, objects) {
        const shapes = objects.map(({ lastSeen }) => lastSeen.shape);
        const answer = await callFunction(context, frame, { type: 'init_tracking', shapes });
        return checkLength(answer.states, shapes.length, 'states');
    }

    /**
     * Track all objects to a frame; where states have expired, start again from the last shapes.
     * @param {RunContext} context
     * @param {TrackedObject[]} objects
     * @param {number} frame
     * @param {unknown[]} states
     */
    async function trackFrame(context, objects, frame, states) {
        const track = async (/** @type {unknown[]} */ from) => {
            const answer = await callFunction(context, frame, { type: 'track', states: from });
            return {
                shapes: checkLength(answer.shapes, from.length, 'shapes'),
                states: checkLength(answer.states, from.length, 'states'),
            };
        };
        try {
            return await track(states);
        } catch (error) {
            if (!isExpiredState(error)) {
                throw error;
            }
            return track(await restartTracking(context, objects));
        }
    }

    /**
     * @param {RunContext} context
     * @param {TrackedObject[]} objects
     * @returns {Promise<unknown[]>} new states, by one request per frame they were last seen on
     */
    async function restartTracking(context, objects) {
        /** @type {unknown[]} */
        const states = [];
        for (const frame of new Set(objects.map(({ lastSeen }) => lastSeen.frame))) {
            const seenHere = objects.filter(({ lastSeen }) => lastSeen.frame === frame);
            const newStates = await startTracking(context, frame, seenHere);
            seenHere.forEach((object, i) => {
                states[objects.indexOf(object)] = newStates[i];
            });
        }
        return states;
    }

    /**
     * Add the function's answer to an object's positions. `null` says that the object is not in the
     * frame; `outside` says the same of a rectangle, for which stock CVAT cannot take null.
     * @param {TrackedObject} object
     * @param {number} frame
     * @param {unknown} answer
     * @returns {boolean} false for a malformed shape, which counts as not visible
     */
    function recordPosition(object, frame, answer) {
        const shape = Array.isArray(answer) ? { type: 'rectangle', points: answer } : answer;
        const { type, points, outside } = /** @type {Partial<Keyframe>} */ (shape ?? {});
        const isInFrame = shape !== null && shape !== undefined && outside !== true;
        const visible = isInFrame && type === object.type && isValidShape(type, points);
        if (visible) {
            const validPoints = /** @type {number[]} */ (points);
            object.lastSeen = { frame, shape: { type: object.type, points: validPoints } };
        }
        object.positions.push({ frame, points: object.lastSeen.shape.points, visible });
        return visible || !isInFrame;
    }

    // ------------------------------------------------------------------ calling the function

    /**
     * Call the function; after a temporary failure call it again, with growing pauses.
     * @param {RunContext} context
     * @param {number} frame
     * @param {object} body
     * @returns {Promise<Answer>}
     */
    async function callFunction(context, frame, body) {
        const { core, model, session, input } = context;
        const inJob = session.taskId !== undefined;
        const taskId = session.taskId ?? session.id;
        const request = { ...body, frame, ...(inJob ? { job: session.id } : {}) };
        for (let attempt = 0; ; attempt += 1) {
            try {
                return await core.lambda.call(taskId, model, request);
            } catch (error) {
                if (!isTemporary(error) || attempt === RETRY_PAUSES_MS.length) {
                    throw error;
                }
                const pause = RETRY_PAUSES_MS[attempt];
                input.onProgress(
                    `Frame ${frame}: ${explainError(error)} · trying again in ${pause / 1000} s `
                    + `(${attempt + 1} of ${RETRY_PAUSES_MS.length})`,
                    context.percent ?? 0,
                );
                await pauseUnlessCancelled(pause, input.cancelled);
            }
        }
    }

    /**
     * @param {number} milliseconds
     * @param {() => boolean} cancelled
     */
    async function pauseUnlessCancelled(milliseconds, cancelled) {
        for (let left = milliseconds; left > 0; left -= POLL_MS) {
            if (cancelled()) {
                throw new Cancelled();
            }
            await sleep(Math.min(left, POLL_MS));
        }
    }

    /**
     * @param {number} milliseconds
     * @returns {Promise<void>}
     */
    function sleep(milliseconds) {
        return new Promise((resolve) => {
            setTimeout(resolve, milliseconds);
        });
    }

    /**
     * @param {unknown} error
     * @returns {number} HTTP status; 0: no answer came
     */
    function statusOf(error) {
        const { code } = /** @type {{code?: unknown}} */ (error ?? {});
        return typeof code === 'number' ? code : code === 'ERR_NETWORK' ? 0 : NaN;
    }

    /** @param {unknown} error */
    function isTemporary(error) {
        return [0, 503].includes(statusOf(error));
    }

    /**
     * CVAT refuses a state that it signed more than 8 hours ago with 400; the function answers 410.
     * @param {unknown} error
     */
    function isExpiredState(error) {
        const status = statusOf(error);
        return status === 410 || (status === 400 && /expired tracker state/i.test(String(error)));
    }

    /**
     * @param {unknown} error
     * @returns {string} in an annotator's words
     */
    function explainError(error) {
        const status = statusOf(error);
        const text = messageOf(error);
        if (error instanceof BadAnswer) {
            return text;
        }
        if (!status && /timeout|timed out/i.test(text)) {
            return 'the function took too long';
        }
        const general = status >= 500 ? 'the function failed'
            : status >= 400 ? 'the function refused the request' : 'an unexpected error';
        const reason = isExpiredState(error)
            ? 'the tracking state has expired' : REASONS.get(status) ?? general;
        return status ? `${reason} (${status})` : reason;
    }

    /**
     * @param {unknown} error
     * @returns {string | undefined} the text that came with the error, for whoever looks for its
     *     cause
     */
    function rawText(error) {
        return error instanceof BadAnswer
            ? undefined : messageOf(error).trim().slice(0, MAX_DETAILS) || undefined;
    }

    /** @param {unknown} error */
    function messageOf(error) {
        return error instanceof Error ? error.message : String(error);
    }

    /**
     * @param {unknown} list from the function's answer
     * @param {number} length
     * @param {string} name
     * @returns {unknown[]}
     */
    function checkLength(list, length, name) {
        if (!Array.isArray(list) || list.length !== length) {
            const count = Array.isArray(list) ? list.length : 'no';
            throw new BadAnswer(
                `the function answered ${count} ${name} for ${countOf(length, 'object')}`,
            );
        }
        return list;
    }

    // ------------------------------------------------------------------ results as tracks

    // The keyframe rules. tests/keyframe_cases.json has them in cases that cvat_task/ is tested
    // with too: change both together.

    /**
     * Add a track for each of the objects, in place of the original.
     * @param {TrackedObject[]} objects
     * @param {number} interval
     * @param {number | undefined} nextFrame
     * @param {ActionResult} result
     */
    function addTracks(objects, interval, nextFrame, result) {
        for (const object of objects) {
            result.created.tracks.push(buildTrack(object, interval, nextFrame));
            deleteOriginal(result, object);
        }
    }

    /**
     * The original's keyframes, with those from the first to the last tracked frame replaced. A
     * keyframe on a deleted frame among them is removed too: it would bend what is between its
     * neighbours.
     * @param {TrackedObject} object
     * @param {number} interval every how many tracked frames there is a keyframe
     * @param {number | undefined} nextFrame the job's first frame after all tracked ones
     * @returns {Track}
     */
    function buildTrack(object, interval, nextFrame) {
        const { original, originalKeyframes, start, positions, mutableIds } = object;
        const isFixed = (/** @type {Attribute} */ { spec_id: id }) => !mutableIds.has(String(id));
        const tracked = [start, ...positions].map(({ frame }) => frame).sort((a, b) => a - b);
        const [first, last] = [tracked[0], tracked[tracked.length - 1]];
        const keyframes = sortByFrame([
            ...originalKeyframes.filter(({ frame }) => frame < first || frame > last),
            start,
            ...selectPositions(object, tracked, interval)
                .map((position) => positionToKeyframe(object, position)),
        ]).map((keyframe) => ({ ...keyframe }));
        // A track begins where the object is first seen.
        keyframes.splice(0, keyframes.findIndex(({ outside }) => !outside));
        carryAttributes(originalKeyframes, keyframes);

        const end = keyframeInForce(keyframes, last);
        const continues = 'shapes' in original && !isOutside(originalKeyframes, Number(nextFrame));
        if (nextFrame !== undefined && !continues && end && !end.outside
            && !keyframes.some(({ frame }) => frame === nextFrame)) {
            keyframes.push({ ...end, frame: nextFrame, outside: true, attributes: [] });
        }
        return {
            frame: keyframes[0].frame,
            label_id: original.label_id,
            group: original.group,
            source: MADE_BY_TRACKING,
            attributes: original.attributes.filter(isFixed),
            elements: [],
            shapes: sortByFrame(keyframes),
        };
    }

    /**
     * The positions that become keyframes: every N-th, the last, both sides of each change of
     * visibility, and the first one on or after a change of anything else in the original.
     * @param {TrackedObject} object
     * @param {number[]} tracked frames, ascending, with the current one
     * @param {number} interval
     */
    function selectPositions({ positions, originalKeyframes }, tracked, interval) {
        const changed = new Set(changeFrames(originalKeyframes)
            .filter((change) => change >= tracked[0])
            .map((change) => tracked.find((frame) => frame >= change)));
        return positions.filter(({ frame, visible }, i) => {
            const visibleBefore = i ? positions[i - 1].visible : true;
            const visibleAfter = positions[i + 1]?.visible ?? visible;
            return (i + 1) % interval === 0 || i === positions.length - 1
                || visible !== visibleBefore || visible !== visibleAfter || changed.has(frame);
        });
    }

    /**
     * @param {Keyframe[]} keyframes ascending
     * @returns {number[]} frames where an attribute, `occluded` or `z_order` changes. A listed
     *     attribute changes if its value differs from the value in force, the last listed before.
     */
    function changeFrames(keyframes) {
        /** @type {Map<string, string>} */
        const inForce = new Map();
        return keyframes.filter(({ attributes, occluded, z_order: zOrder }, i) => {
            const before = keyframes[i - 1];
            const hasNewValue = attributes.some(
                ({ spec_id: id, value }) => inForce.get(String(id)) !== value,
            );
            attributes.forEach(({ spec_id: id, value }) => inForce.set(String(id), value));
            return i > 0
                && (hasNewValue || occluded !== before.occluded || zOrder !== before.z_order);
        }).map(({ frame }) => frame);
    }

    /**
     * @param {TrackedObject} object
     * @param {Position} position
     * @returns {Keyframe}
     */
    function positionToKeyframe({ type, originalKeyframes }, { frame, points, visible }) {
        const { occluded, z_order: zOrder } = keyframeInForce(originalKeyframes, frame)
            ?? originalKeyframes[0];
        return {
            type,
            frame,
            points,
            rotation: 0,
            occluded,
            outside: !visible,
            z_order: zOrder,
            attributes: [],
        };
    }

    /**
     * Attributes are in force from their keyframe on: those of a removed keyframe move to the next
     * one, and those of the original's first keyframe also to a new first keyframe before it.
     * @param {Keyframe[]} originalKeyframes
     * @param {Keyframe[]} keyframes ascending; get the attributes
     */
    function carryAttributes(originalKeyframes, keyframes) {
        for (const { frame, attributes } of [...originalKeyframes].reverse()) {
            const successor = keyframes.find((keyframe) => keyframe.frame >= frame);
            if (successor) {
                successor.attributes = mergeAttributes(attributes, successor.attributes);
            }
        }
        if (keyframes[0].frame < originalKeyframes[0].frame) {
            keyframes[0].attributes = [...originalKeyframes[0].attributes];
        }
    }

    /**
     * @param {Attribute[]} earlier
     * @param {Attribute[]} later take precedence
     */
    function mergeAttributes(earlier, later) {
        const pairs = [...earlier, ...later]
            .map((attribute) => /** @type {const} */ ([String(attribute.spec_id), attribute]));
        return [...new Map(pairs).values()];
    }

    /**
     * @param {Shape} shape
     * @param {Set<string>} mutableIds
     * @returns {Keyframe}
     */
    function shapeToKeyframe(shape, mutableIds) {
        return {
            type: shape.type,
            frame: shape.frame,
            points: shape.points,
            rotation: shape.rotation ?? 0,
            occluded: shape.occluded,
            outside: false,
            z_order: shape.z_order,
            attributes: shape.attributes.filter(({ spec_id: id }) => mutableIds.has(String(id))),
        };
    }

    /**
     * @param {Keyframe[]} keyframes ascending
     * @param {number} frame
     * @returns {Keyframe | undefined} the last keyframe up to the frame
     */
    function keyframeInForce(keyframes, frame) {
        return keyframes.findLast((keyframe) => keyframe.frame <= frame);
    }

    /**
     * @param {Keyframe[]} keyframes ascending
     * @param {number} frame
     */
    function isOutside(keyframes, frame) {
        return keyframeInForce(keyframes, frame)?.outside ?? true;
    }

    /**
     * @template {{frame: number}} T
     * @param {T[]} keyframes
     * @returns {T[]}
     */
    function sortByFrame(keyframes) {
        return [...keyframes].sort((a, b) => a.frame - b.frame);
    }

    /**
     * @param {Keyframe} keyframe
     * @returns {Keyframe}
     */
    function withoutId({ id, ...rest }) {
        return rest;
    }

    // ------------------------------------------------------------------ results as shapes

    /**
     * Add one shape per frame for each object that does not become a track, in the object's group;
     * delete the shapes of an earlier run that they replace.
     * @param {RunContext} context
     * @param {TrackedObject[]} objects
     * @param {number[]} trackedFrames
     * @param {ActionResult} result
     */
    async function addShapes(context, objects, trackedFrames, result) {
        const { session, input } = context;
        const current = input.frameData.number;
        const fromShapes = objects.filter(({ original }) => !('shapes' in original));
        const reserved = await deleteEarlierShapes(
            session, fromShapes, current, trackedFrames, result,
        );
        let group = Math.max(context.largestGroup, await largestGroupOf(session));
        for (const object of fromShapes.filter(({ asTrack }) => !asTrack)) {
            const original = /** @type {Shape} */ (object.original);
            const shapes = object.positions
                .filter(({ frame, visible }) => visible && !reserved.get(object)?.has(frame))
                .map(({ frame, points }) => copyShape(
                    original, { frame, points, rotation: 0, source: MADE_BY_TRACKING },
                ));
            if (shapes.length && !original.group) {
                group += 1;
                shapes.unshift(copyShape(original, {}));
                shapes.forEach((shape) => {
                    shape.group = group;
                });
                deleteOriginal(result, object);
            }
            result.created.shapes.push(...shapes);
        }
    }

    /**
     * @param {Shape} shape
     * @param {Partial<Shape>} changes
     * @returns {Shape}
     */
    function copyShape({ id, clientID, ...rest }, changes) {
        return { ...rest, outside: false, ...changes };
    }

    /** @param {Session} session */
    async function largestGroupOf(session) {
        // A run on a single object gets the collection without all other objects.
        return session.annotations.export
            ? findLargestGroup(await session.annotations.export()) : 0;
    }

    /** @param {Collection} collection */
    function findLargestGroup({ shapes, tracks }) {
        return [...shapes, ...tracks].reduce((largest, { group }) => Math.max(largest, group), 0);
    }

    /**
     * Delete the shapes of an earlier run: same series (group, label and type), made by tracking.
     * A shape that is locked or has another source stays, and the object gets no new shape there.
     * @param {Session} session
     * @param {TrackedObject[]} objects
     * @param {number} current
     * @param {number[]} trackedFrames
     * @param {ActionResult} result
     * @returns {Promise<Map<TrackedObject, Set<number>>>} for each object the frames where a shape
     *     stays
     */
    async function deleteEarlierShapes(session, objects, current, trackedFrames, result) {
        /** @type {Map<TrackedObject, Set<number>>} */
        const reserved = new Map(objects.map((object) => [object, new Set()]));
        const grouped = objects.filter(({ original }) => original.group);
        const bySeries = groupBy(grouped, ({ original, type }) => (
            seriesKey(original.group, original.label_id, type)
        ));
        if (!bySeries.size) {
            return reserved;
        }
        const alikeNow = countSeries(await session.annotations.get(current, false, []));
        for (const frame of trackedFrames) {
            const states = await session.annotations.get(frame, false, []);
            for (const [key, members] of bySeries) {
                const earlier = states.filter((state) => seriesOf(state) === key);
                // With more shapes than objects on a frame, some belong to no tracked object.
                const isComplete = members.length === alikeNow.get(key)
                    && earlier.length <= members.length;
                const matches = matchEarlierShapes(earlier, members, frame, isComplete);
                for (const [state, object] of matches) {
                    if (state.source !== MADE_BY_TRACKING || !isVisibleAndUnlocked(state)) {
                        reserved.get(object)?.add(frame);
                    } else {
                        result.deleted.shapes.push({ clientID: state.clientID });
                    }
                }
            }
        }
        return reserved;
    }

    /**
     * Find the object that each earlier shape belongs to. Among several objects of a series it is
     * the one whose new shape overlaps the earlier shape most. An earlier shape without a match
     * belongs to an object that is not tracked now.
     * @param {ObjectState[]} earlier
     * @param {TrackedObject[]} members
     * @param {number} frame
     * @param {boolean} isComplete whether all objects of the series are tracked now: then an
     *     earlier shape belongs to one of them even without overlap
     * @returns {Map<ObjectState, TrackedObject>}
     */
    function matchEarlierShapes(earlier, members, frame, isComplete) {
        const pairs = earlier.flatMap((state) => members.map((object) => {
            const position = object.positions.find((candidate) => candidate.frame === frame);
            const box = boundingBox(object.type, position?.points ?? object.start.points);
            const earlierBox = boundingBox(state.shapeType, state.points);
            return { state, object, overlap: intersectionOverUnion(earlierBox, box) };
        })).sort((a, b) => b.overlap - a.overlap);
        /** @type {Map<ObjectState, TrackedObject>} */
        const matches = new Map();
        const matchedObjects = new Set();
        for (const { state, object, overlap } of pairs) {
            if (overlap > 0 && !matches.has(state) && !matchedObjects.has(object)) {
                matches.set(state, object);
                matchedObjects.add(object);
            }
        }
        if (isComplete) {
            const unmatched = members.filter((object) => !matchedObjects.has(object));
            earlier.filter((state) => !matches.has(state))
                .forEach((state, index) => matches.set(state, unmatched[index]));
        }
        return matches;
    }

    /**
     * @param {number | undefined} group
     * @param {number | undefined} labelId
     * @param {string} type
     */
    function seriesKey(group, labelId, type) {
        return [group, labelId, type].join(' ');
    }

    /** @param {ObjectState} state */
    function seriesOf(state) {
        return state.objectType === 'shape'
            ? seriesKey(state.group?.id, state.label?.id, state.shapeType) : '';
    }

    /**
     * @param {ObjectState[]} states
     * @returns {Map<string, number>}
     */
    function countSeries(states) {
        return new Map([...groupBy(states, seriesOf)].map(([key, alike]) => [key, alike.length]));
    }

    /**
     * @template T
     * @param {T[]} items
     * @param {(item: T) => string} keyOf
     * @returns {Map<string, T[]>}
     */
    function groupBy(items, keyOf) {
        /** @type {Map<string, T[]>} */
        const groups = new Map();
        for (const item of items) {
            const key = keyOf(item);
            groups.set(key, [...(groups.get(key) ?? []), item]);
        }
        return groups;
    }

    // ------------------------------------------------------------------ geometry

    /**
     * CVAT's commit stops half-way at a shape that it cannot read, so none may reach it.
     * @param {string} type
     * @param {unknown} points
     */
    function isValidShape(type, points) {
        if (!Array.isArray(points) || !points.every(Number.isFinite)) {
            return false;
        }
        const [a, b, c, d] = points;
        switch (type) {
            case 'polygon': return points.length >= 6 && points.length % 2 === 0;
            case 'rectangle': return points.length === 4 && a < c && b < d;
            case 'ellipse': return points.length === 4 && a < c && b > d;
            case 'mask': return isValidMask(points);
            default: return false;
        }
    }

    /** @param {number[]} points run lengths, then the box with its far edge included */
    function isValidMask(points) {
        const runs = points.slice(0, -4);
        const [x1, y1, x2, y2] = points.slice(-4);
        const area = (x2 - x1 + 1) * (y2 - y1 + 1);
        return runs.length >= 1 && x1 <= x2 && y1 <= y2
            && points.every((value) => Number.isInteger(value) && value >= 0)
            && runs.reduce((sum, run) => sum + run, 0) === area;
    }

    /**
     * The points of a rotated rectangle's or ellipse's upright extent: the function takes no
     * rotation.
     * @param {Keyframe} keyframe
     * @returns {number[]}
     */
    function uprightExtent({ type, points, rotation }) {
        if (!rotation || (type !== 'rectangle' && type !== 'ellipse')) {
            return points;
        }
        const angle = (rotation * Math.PI) / 180;
        const [cos, sin] = [Math.abs(Math.cos(angle)), Math.abs(Math.sin(angle))];
        if (type === 'ellipse') {
            const [cx, cy, right, top] = points;
            const [rx, ry] = [right - cx, cy - top];
            const halfWidth = Math.hypot(rx * cos, ry * sin);
            const halfHeight = Math.hypot(rx * sin, ry * cos);
            return [cx, cy, cx + halfWidth, cy - halfHeight];
        }
        const [x1, y1, x2, y2] = points;
        const [cx, cy, w, h] = [(x1 + x2) / 2, (y1 + y2) / 2, (x2 - x1) / 2, (y2 - y1) / 2];
        const [halfWidth, halfHeight] = [w * cos + h * sin, w * sin + h * cos];
        return [cx - halfWidth, cy - halfHeight, cx + halfWidth, cy + halfHeight];
    }

    /**
     * @param {string} type
     * @param {number[]} points
     * @returns {number[]} x1, y1, x2, y2; the far edge is excluded
     */
    function boundingBox(type, points) {
        if (type === 'mask') {
            const [x1, y1, x2, y2] = points.slice(-4);
            return [x1, y1, x2 + 1, y2 + 1];
        }
        if (type === 'ellipse') {
            const [cx, cy, right, top] = points;
            return [2 * cx - right, top, right, 2 * cy - top];
        }
        const xs = points.filter((_, i) => i % 2 === 0);
        const ys = points.filter((_, i) => i % 2 === 1);
        return [Math.min(...xs), Math.min(...ys), Math.max(...xs), Math.max(...ys)];
    }

    /**
     * @param {number[]} a x1, y1, x2, y2
     * @param {number[]} b
     */
    function intersectionOverUnion(a, b) {
        const width = Math.max(0, Math.min(a[2], b[2]) - Math.max(a[0], b[0]));
        const height = Math.max(0, Math.min(a[3], b[3]) - Math.max(a[1], b[1]));
        const area = (/** @type {number[]} */ [x1, y1, x2, y2]) => (x2 - x1) * (y2 - y1);
        return (width * height) / (area(a) + area(b) - width * height);
    }

    // ------------------------------------------------------------------ messages

    /**
     * @param {number} count
     * @param {string} noun in the singular
     */
    function countOf(count, noun) {
        return `${count} ${noun}${count === 1 ? '' : 's'}`;
    }

    /** @param {number} seconds */
    function formatDuration(seconds) {
        const whole = Math.round(seconds);
        const [minutes, hours] = [Math.floor(whole / 60), Math.floor(whole / 3600)];
        return hours ? `${hours} h ${minutes % 60} min`
            : minutes ? `${minutes} min ${whole % 60} s` : `${whole} s`;
    }

    /**
     * What annotators read after a run: CVAT's window itself says nothing.
     * @typedef {object} Notice
     * @property {'done' | 'cancelled' | 'failed'} kind
     * @property {string[]} lines
     * @property {string} [details] the text of the failed call
     */

    /**
     * @param {Outcome} outcome
     * @param {TrackedObject[]} objects
     * @param {number} current
     * @param {number} others how many objects of the frame were left out
     * @returns {Notice}
     */
    function describeOutcome(outcome, objects, current, others) {
        const { trackedFrames, cancelledAt, failure, malformed } = outcome;
        const [first, last] = [trackedFrames[0], trackedFrames[trackedFrames.length - 1]];
        const kept = trackedFrames.length
            ? `Kept: frames ${Math.min(current, last)} to ${Math.max(current, last)}.`
            : 'Nothing was changed.';
        const lines = [malformed, describeLosses(objects)];
        if (others) {
            lines.push(`Only the activated object was tracked; the frame has ${others} more.`);
        }
        if (trackedFrames.length) {
            lines.push(failure || outcome.cancelled
                ? 'One undo takes it back. If the picture is not up to date, change the frame.'
                : 'One undo takes it back.');
        }
        /** @type {Notice['kind']} */
        let kind = 'done';
        if (failure || cancelledAt !== undefined) {
            kind = failure ? 'failed' : 'cancelled';
            lines.unshift(`${failure?.message ?? `Cancelled before frame ${cancelledAt}.`} ${kept}`);
        } else {
            const span = first === last ? `${first}` : `${first} to ${last}`;
            lines.unshift(
                `Done: ${countOf(objects.length, 'object')} on `
                + `${countOf(trackedFrames.length, 'frame')} (${span}) in `
                + `${formatDuration(Math.max(1, outcome.seconds))}.`,
            );
        }
        return {
            kind,
            lines: lines.filter((line) => line !== undefined),
            details: failure?.details,
        };
    }

    /** @param {TrackedObject[]} objects */
    function describeLosses(objects) {
        const losses = objects.map(({ label, positions }) => ({
            label,
            frames: positions.filter(({ visible }) => !visible).length,
            all: positions.length,
        })).filter(({ frames }) => frames).sort((a, b) => b.frames - a.frames);
        if (!losses.length) {
            return undefined;
        }
        const listed = losses.slice(0, MAX_LISTED)
            .map(({ label, frames, all }) => `${label} (${frames} of ${all})`);
        if (losses.length > MAX_LISTED) {
            listed.push(`and ${losses.length - MAX_LISTED} more`);
        }
        return `${countOf(losses.length, 'object')} lost on some frames: ${listed.join(', ')}.`;
    }

    // The font is that of CVAT's UI. The colours are Ant Design's, as in CVAT; texts have a contrast
    // of at least 4.5 to 1.
    const NOTICE_STYLE = `
        :host { all: initial; }
        .sam2-tracker-notice {
            position: fixed; top: 16px; right: 16px; z-index: 10000; box-sizing: border-box;
            width: 420px; max-width: calc(100% - 32px);
            max-height: calc(100% - 32px); overflow: auto; overflow-wrap: anywhere;
            padding: 12px 12px 12px 16px; background: #fff; color: #262626;
            border: 1px solid #d9d9d9; border-left-width: 4px; border-radius: 6px;
            box-shadow: 0 4px 12px rgba(0, 0, 0, .2);
            font: 14px/1.5 -apple-system, BlinkMacSystemFont, 'Segoe UI', Roboto, 'Helvetica Neue',
                Arial, sans-serif;
        }
        .done { border-left-color: #389e0d; }
        .cancelled { border-left-color: #d46b08; }
        .failed { border-left-color: #cf1322; }
        header { display: flex; gap: 8px; align-items: start; font-weight: 600; }
        header span { flex: 1; padding-top: 2px; }
        p { margin: 4px 0 0; padding-right: 4px; }
        button {
            flex: none; width: 26px; height: 26px; padding: 0; border: 0; border-radius: 4px;
            background: #fff; color: #595959; font: inherit; font-size: 18px; line-height: 1;
            cursor: pointer;
        }
        button:hover { background: #f0f0f0; }
        details { margin-top: 8px; }
        summary { color: #0958d9; cursor: pointer; }
        pre {
            margin: 4px 4px 0 0; padding: 8px; border-radius: 4px; background: #f5f5f5;
            color: #262626; font-size: 12px; white-space: pre-wrap;
        }
        button:focus-visible, summary:focus-visible { outline: 2px solid #0958d9; }
    `;

    /** @type {HTMLElement | null} */
    let noticeHost = null;

    function removeNotice() {
        noticeHost?.remove();
        noticeHost = null;
        document.removeEventListener('keydown', closeOnEscape, true);
    }

    /** @param {KeyboardEvent} event */
    function closeOnEscape(event) {
        if (event.key === 'Escape') {
            removeNotice();
        }
    }

    /**
     * Show a notice beside CVAT's window until it is closed or the next run begins. It is in a
     * shadow tree, so that CVAT's styles do not apply to it.
     * @param {string} title
     * @param {Notice} notice
     */
    function showNotice(title, { kind, lines, details }) {
        removeNotice();
        noticeHost = document.createElement('div');
        const box = createElement('section', '');
        box.className = `sam2-tracker-notice ${kind}`;
        box.setAttribute('aria-label', title);
        const style = createElement('style', NOTICE_STYLE);
        noticeHost.attachShadow({ mode: 'open' }).append(style, box);
        document.body.append(noticeHost);

        const close = createElement('button', '×');
        close.setAttribute('type', 'button');
        close.setAttribute('aria-label', 'Close');
        close.addEventListener('click', removeNotice);
        const header = createElement('header', '');
        header.append(createElement('span', title), close);
        const message = createElement('div', '');
        message.setAttribute('role', kind === 'failed' ? 'alert' : 'status');
        box.append(header, message);
        // The live region is in the page before its text: else some screen readers do not read it.
        message.append(...lines.map((line) => createElement('p', line)));
        if (details) {
            const disclosure = createElement('details', '');
            disclosure.append(createElement('summary', 'Details'), createElement('pre', details));
            box.append(disclosure);
        }
        // CVAT has shortcuts for these keys, which press the button and open the details here.
        for (const type of ['keydown', 'keypress', 'keyup']) {
            box.addEventListener(type, (event) => {
                if ([' ', 'Enter'].includes(/** @type {KeyboardEvent} */ (event).key)) {
                    event.stopPropagation();
                }
            });
        }
        // In the capture phase: a dialog may stop the event before it bubbles to the document.
        document.addEventListener('keydown', closeOnEscape, true);
    }

    /**
     * @param {string} tag
     * @param {string} text
     */
    function createElement(tag, text) {
        const element = document.createElement(tag);
        element.textContent = text;
        return element;
    }

    // ------------------------------------------------------------------ CVAT's page

    /**
     * Make CVAT read the objects of the shown frame again. Its window does that itself, but not
     * after Cancel. CVAT's own undo updates the page in this way (`undoActionAsync` in
     * cvat-ui/src/actions/annotation-actions.ts).
     * @param {Session} session
     */
    async function refreshFrame(session) {
        try {
            const { dispatch, actionCreators, store } = findPluginTools();
            const { job, player } = store.getState().annotation;
            if (job.instance?.id === session.id) {
                const frame = player.frame.number;
                await dispatch(actionCreators.changeFrameAsync(frame, undefined, undefined, true));
            }
        } catch (error) { // in another version of CVAT; the notice tells what to do
            console.info(LOG_PREFIX, 'could not update the frame:', error);
        }
    }

    /** @returns {PluginTools} */
    function findPluginTools() {
        const { cvatUI } = /** @type {{cvatUI?: {registerComponent: (builder: object) => void}}} */ (
            globalThis
        );
        /** @type {PluginTools | undefined} */
        let tools;
        cvatUI?.registerComponent((/** @type {PluginTools} */ given) => {
            tools = given;
            return { name: 'sam2-tracker-action', destructor: () => {} };
        });
        if (!tools) {
            throw new Error('this page has no interface for plugins');
        }
        return tools;
    }

    // ------------------------------------------------------------------ registration

    /** @returns {Promise<Core | null>} null: the page has no CVAT with annotation actions */
    async function findCore() {
        const page = /** @type {{cvat?: Partial<Core>}} */ (globalThis);
        for (let waited = 0; !page.cvat && waited < CORE_WAIT_MS; waited += POLL_MS) {
            await sleep(POLL_MS);
        }
        const { actions, classes, lambda } = page.cvat ?? {};
        const hasActions = actions?.register && classes?.BaseCollectionAction
            && lambda?.list && lambda?.call;
        return hasActions ? /** @type {Core} */ (page.cvat) : null;
    }

    /** @typedef {Map<string, {model: Model, action: object}>} Registered by function id */

    /**
     * Register an action for each tracker function that the server lists; unregister all others.
     * @param {Core} core
     * @param {Registered} registered changed
     */
    async function updateActions(core, registered) {
        const { models } = await core.lambda.list();
        const trackers = models.filter((model) => model.kind === 'tracker');
        for (const [id, { action }] of registered) {
            if (core.actions.unregister && !trackers.some((model) => model.id === id)) {
                await core.actions.unregister(action);
                registered.delete(id);
            }
        }
        for (const model of trackers) {
            const entry = registered.get(model.id);
            if (entry) {
                entry.model = model;
            } else {
                await registerAction(core, registered, model);
            }
        }
    }

    /**
     * Register an action under the function's name, or with its id behind it if that name is taken.
     * @param {Core} core
     * @param {Registered} registered
     * @param {Model} model
     */
    async function registerAction(core, registered, model) {
        const taken = new Set((await core.actions.list()).map(({ name }) => name));
        const name = [model.name, `${model.name} (${model.id})`].find((free) => !taken.has(free));
        if (name) {
            const action = createAction(core, name, () => registered.get(model.id)?.model);
            await core.actions.register(action);
            registered.set(model.id, { model, action });
        }
    }

    /**
     * Keep the actions up to date: listing functions fails before the login, and functions are
     * deployed and removed later. The server is asked when the page's address changes and once a
     * minute while the page is visible.
     * @param {Core} core
     */
    async function watchFunctions(core) {
        /** @type {Registered} */
        const registered = new Map();
        let address = '';
        let dueAt = 0;
        for (;;) {
            const { pathname } = window.location;
            const isDue = pathname !== address || performance.now() >= dueAt;
            if (isDue && !document.hidden && !pathname.startsWith('/auth')) {
                address = pathname;
                const pause = await updateActions(core, registered)
                    .then(() => LIST_AGAIN_MS, () => LIST_RETRY_MS);
                dueAt = performance.now() + pause;
            }
            await sleep(ADDRESS_CHECK_MS);
        }
    }

    async function main() {
        const page = /** @type {{sam2TrackerAction?: boolean}} */ (globalThis);
        if (page.sam2TrackerAction) {
            return; // the script is loaded twice: by the server, and as a user script
        }
        page.sam2TrackerAction = true;
        const core = await findCore();
        if (core) {
            await watchFunctions(core);
        } else {
            console.info(
                LOG_PREFIX, 'this page has no CVAT with annotation actions; nothing was added.',
            );
        }
    }

    main();
})();
