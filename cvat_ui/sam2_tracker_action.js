// ==UserScript==
// @name         Segment Anything 2: Tracker for CVAT
// @namespace    sam2-cvat-tracker
// @version      1.0.0
// @description  Tracks objects with a tracker function from CVAT's "Run annotation action" window
// @match        http://localhost:8080/*
// @run-at       document-end
// @grant        none
// ==/UserScript==

// The "Run annotation action" window of a stock CVAT gets one action for each tracker function that
// the server lists. README.md beside this file tells how to load it (as a user script: put your
// CVAT's address into @match above). It needs no build step and no other file.
//
// From top to bottom: what CVAT hands over and takes back, numbers, the action, what to track,
// asking the function, results as tracks, results as one shape per frame, registering.

'use strict';

(() => {
    /** @typedef {{spec_id: number | string, value: string}} Attribute */

    /**
     * Where an object is on one frame; a track is a list of them.
     * @typedef {object} Keyframe
     * @property {string} type
     * @property {number} frame
     * @property {number[]} points as CVAT writes them
     * @property {number} [rotation] degrees
     * @property {boolean} occluded
     * @property {boolean} outside
     * @property {number} z_order
     * @property {Attribute[]} attributes in tracks: only those that may change from frame to frame
     * @property {number} [id]
     */

    /**
     * What shapes and tracks of a collection have in common. CVAT wants `clientID` on what is
     * deleted and neither `clientID` nor `id` on what is created.
     * @typedef {object} Owner
     * @property {number} frame
     * @property {number} label_id
     * @property {number} group 0: none
     * @property {string} source
     * @property {Attribute[]} attributes
     * @property {number} [clientID]
     * @property {number} [id]
     * @property {object[]} [elements]
     */

    /** @typedef {Owner & Keyframe} Shape */
    /** @typedef {Owner & {shapes: Keyframe[]}} Track */
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
     * @property {{id?: number, attributes?: {id: number, mutable: boolean}[]}} [label]
     */

    /**
     * A job; a task when it is open outside a job (then without `taskId`).
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
    /** @typedef {{type: string, points: number[]}} Prompt */
    /** @typedef {{shapes?: unknown, states?: unknown}} Answer */
    /**
     * @typedef {{id: string, name: string, kind: string, supportedShapeTypes?: string[]}} Model
     */

    /**
     * CVAT's client core, `globalThis.cvat`.
     * @typedef {object} Core
     * @property {{BaseCollectionAction: new () => object}} classes
     * @property {{register: (action: object) => Promise<void>,
     *     unregister?: (action: object | string) => Promise<void>,
     *     list: () => Promise<{name: string}[]>}} actions
     * @property {{list: () => Promise<{models: Model[]}>,
     *     call: (taskId: number, model: Model, body: object) => Promise<Answer>}} lambda
     */

    /**
     * One object on its way through the frames.
     * @typedef {object} Pursued
     * @property {Shape | Track} origin what the annotator had
     * @property {string} type
     * @property {boolean} asTrack whether the result is a track, else one shape per frame
     * @property {Keyframe[]} original the origin's keyframes, ascending; a shape has one
     * @property {Keyframe} start its place on the current frame
     * @property {{frame: number, points: number[], visible: boolean}[]} found in tracking order;
     *     where it is not visible, the points are the last known
     * @property {{frame: number, prompt: Prompt}} lastSeen
     * @property {Set<string>} mutable ids of the attributes that may change from frame to frame
     */

    const TARGET = 'Target frame';
    const CONVERT = 'Convert polygon shapes to tracks';
    const EVERY = 'Keyframe every N frames';

    const LOG = 'SAM 2 tracker:';
    const PAUSES_MS = [1000, 3000, 9000]; // after a 503 or a network error
    const POLL_MS = 250; // how often a pause looks whether the annotator cancelled
    const CORE_WAIT_MS = 60_000; // until we say that this page has no CVAT in it
    const WATCH_MS = 1000; // how often the page's address is looked at
    const LIST_AGAIN_MS = 60_000; // the server is asked for its functions so often while visible,
    const LIST_RETRY_MS = 10_000; // so often while that fails, and whenever the address changes

    /** Thrown to leave a pause when the annotator has pressed Cancel. */
    class Cancelled extends Error {}

    // ------------------------------------------------------------------ the action

    /**
     * @param {Core} core
     * @param {string} name as the window lists it
     * @param {() => Model | undefined} findModel the function, as the server listed it last
     */
    function createAction(core, name, findModel) {
        /** @type {{session: Session, parameters: Record<string, unknown>} | null} */
        let setUp = null;
        let largestGroup = 0;
        const types = () => new Set(findModel()?.supportedShapeTypes ?? ['rectangle']);

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
                setUp = { session, parameters };
            }

            async destroy() {
                setUp = null;
            }

            /** @param {FilterInput} input */
            applyFilter({ collection, frameData }) {
                largestGroup = findLargestGroup(collection);
                return onFrame(collection, frameData.number, types());
            }

            /** @param {ObjectState} state */
            isApplicableForObject(state) {
                return state.objectType !== 'tag' && types().has(state.shapeType) && isFree(state);
            }

            /** @param {RunInput} input */
            async run(input) {
                const model = findModel();
                if (!model || !setUp) {
                    throw new Error(`${name}: the server no longer lists this function.`);
                }
                dismissNotice();
                return trackAndCollect({ core, model, largestGroup, ...setUp, input });
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
            [EVERY]: { type: 'number', values: ['1', '1000', '1'], defaultValue: '1' },
        };
    }

    /**
     * @typedef {object} Run
     * @property {Core} core
     * @property {Model} model
     * @property {Session} session
     * @property {Record<string, unknown>} parameters
     * @property {number} largestGroup
     * @property {RunInput} input
     * @property {number} [percent] how far it is
     */

    /** @param {Run} run */
    async function trackAndCollect(run) {
        const { session, parameters, input } = run;
        const current = input.frameData.number;
        const target = readTarget(session, parameters[TARGET], current);
        const convert = String(parameters[CONVERT]) === 'true';
        const everyN = Math.max(1, Math.round(Number(parameters[EVERY])) || 1);
        const numbers = await listFrames(session);
        const frames = await framesBetween(session, numbers, current, target);
        const pursued = await choose(session, input, convert);

        const outcome = await pursue(run, pursued, current, frames);
        const { done } = outcome;
        const kept = done.length
            ? `Kept: ${span([current, ...done])}. `
              + 'One undo takes it back; if the picture is not up to date, change the frame.'
            : 'Nothing was changed.';
        if (outcome.failure && !done.length) {
            throw new Error(`${outcome.failure} ${kept}`);
        }
        const result = emptyResult();
        if (done.length) {
            const touched = [current, ...done];
            const next = await firstAfter(session, numbers, Math.max(...ends(touched)));
            const asTracks = pursued.filter((object) => object.asTrack);
            for (const object of asTracks) {
                result.created.tracks.push(buildTrack(object, touched, everyN, next));
            }
            markDeleted(result, asTracks);
            await collectShapes(run, pursued, done, result);
        }
        const cancelled = outcome.cancelled === undefined
            ? undefined : `Cancelled before frame ${outcome.cancelled}.`;
        notify(run.model.name, [outcome.failure, outcome.malformed, cancelled], kept);
        return result;
    }

    function emptyResult() {
        return {
            /** @type {Collection} */
            created: { shapes: [], tracks: [], tags: [] },
            /** @type {{shapes: Deleted[], tracks: Deleted[], tags: Deleted[]}} */
            deleted: { shapes: [], tracks: [], tags: [] },
        };
    }

    /**
     * @param {ReturnType<typeof emptyResult>} result
     * @param {Pursued[]} objects
     */
    function markDeleted(result, objects) {
        for (const { origin } of objects) {
            const list = 'shapes' in origin ? result.deleted.tracks : result.deleted.shapes;
            list.push({ ...origin, clientID: Number(origin.clientID) });
        }
    }

    // ------------------------------------------------------------------ what to track

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
     * @returns {Promise<number[]>} ascending, deleted ones among them
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
    async function isDeleted(session, frame) {
        return Boolean((await session.frames.get?.(frame))?.deleted);
    }

    /**
     * @param {Session} session
     * @param {number[]} numbers ascending
     * @param {number} current
     * @param {number} target
     * @returns {Promise<number[]>} in tracking order, without the current one and deleted ones
     */
    async function framesBetween(session, numbers, current, target) {
        const between = target > current
            ? numbers.filter((frame) => frame > current && frame <= target)
            : numbers.filter((frame) => frame < current && frame >= target).reverse();
        const frames = [];
        for (const frame of between) {
            if (!await isDeleted(session, frame)) {
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
     * @param {number[]} numbers ascending
     * @param {number} last
     * @returns {Promise<number | undefined>} the next frame that is not deleted
     */
    async function firstAfter(session, numbers, last) {
        for (const frame of numbers.filter((number) => number > last)) {
            if (!await isDeleted(session, frame)) {
                return frame;
            }
        }
        return undefined;
    }

    /**
     * @param {Collection} collection
     * @param {number} frame
     * @param {Set<string>} types
     * @returns {Collection} the objects that are there on this frame and can be tracked
     */
    function onFrame(collection, frame, types) {
        return {
            shapes: collection.shapes.filter((s) => s.frame === frame && types.has(s.type)),
            tracks: collection.tracks.filter((track) => (
                types.has(track.shapes[0]?.type) && !isOutside(ascending(track.shapes), frame)
            )),
            tags: [],
        };
    }

    /** @param {ObjectState} state */
    function isFree(state) {
        return !state.hidden && !state.lock && !state.outside;
    }

    /**
     * @param {Session} session
     * @param {RunInput} input
     * @param {boolean} convert whether shapes (not masks) become tracks
     * @returns {Promise<Pursued[]>}
     */
    async function choose(session, input, convert) {
        const { collection, frameData } = input;
        const states = new Map(
            (await session.annotations.get(frameData.number, false, []))
                .map((state) => [state.clientID, state]),
        );
        const pursued = [];
        for (const origin of [...collection.shapes, ...collection.tracks]) {
            const state = states.get(Number(origin.clientID));
            if (state && isFree(state)) {
                pursued.push(createPursued(origin, state, frameData.number, convert));
            }
        }
        if (!pursued.length) {
            throw new Error(
                `No object to track on frame ${frameData.number}: draw one, or show and unlock it.`,
            );
        }
        return pursued;
    }

    /**
     * @param {Shape | Track} origin
     * @param {ObjectState} state its place on the current frame
     * @param {number} frame
     * @param {boolean} convert
     * @returns {Pursued}
     */
    function createPursued(origin, state, frame, convert) {
        const mutable = new Set((state.label?.attributes ?? [])
            .filter((attribute) => attribute.mutable).map((attribute) => String(attribute.id)));
        const isTrack = 'shapes' in origin;
        const type = isTrack ? origin.shapes[0].type : origin.type;
        const original = isTrack
            ? ascending(origin.shapes).map(withoutId)
            : [shapeToKeyframe(origin, mutable)];
        const place = original.find((keyframe) => keyframe.frame === frame) ?? {
            type,
            frame,
            points: state.points,
            rotation: state.rotation ?? 0,
            occluded: state.occluded,
            outside: false,
            z_order: state.zOrder,
            attributes: [],
        };
        const prompt = { type, points: upright(place) };
        return {
            origin,
            type,
            asTrack: isTrack || (convert && type !== 'mask'),
            original,
            start: place,
            found: [],
            lastSeen: { frame, prompt },
            mutable,
        };
    }

    /**
     * @param {Shape} shape
     * @param {Set<string>} mutable
     * @returns {Keyframe}
     */
    function shapeToKeyframe(shape, mutable) {
        return {
            type: shape.type,
            frame: shape.frame,
            points: shape.points,
            rotation: shape.rotation ?? 0,
            occluded: shape.occluded,
            outside: false,
            z_order: shape.z_order,
            attributes: shape.attributes.filter(({ spec_id: id }) => mutable.has(String(id))),
        };
    }

    /**
     * The function knows no rotation: a turned rectangle or ellipse starts from its upright extent.
     * @param {Keyframe} keyframe
     * @returns {number[]}
     */
    function upright({ type, points, rotation }) {
        const angle = ((rotation ?? 0) * Math.PI) / 180;
        const [cos, sin] = [Math.abs(Math.cos(angle)), Math.abs(Math.sin(angle))];
        if (!rotation || (type !== 'rectangle' && type !== 'ellipse')) {
            return points;
        }
        if (type === 'ellipse') {
            const [cx, cy, right, top] = points;
            const [rx, ry] = [right - cx, cy - top];
            return [cx, cy, cx + Math.hypot(rx * cos, ry * sin), cy - Math.hypot(rx * sin, ry * cos)];
        }
        const [x1, y1, x2, y2] = points;
        const [cx, cy, w, h] = [(x1 + x2) / 2, (y1 + y2) / 2, (x2 - x1) / 2, (y2 - y1) / 2];
        const [halfWidth, halfHeight] = [w * cos + h * sin, w * sin + h * cos];
        return [cx - halfWidth, cy - halfHeight, cx + halfWidth, cy + halfHeight];
    }

    // ------------------------------------------------------------------ asking the function

    /**
     * Follow the objects, one request a frame for all of them, until done, cancelled or failed.
     * @param {Run} run
     * @param {Pursued[]} pursued what is found is noted in them
     * @param {number} current
     * @param {number[]} frames in tracking order
     */
    async function pursue(run, pursued, current, frames) {
        /** @type {{done: number[], failure?: string, cancelled?: number, malformed?: string}} */
        const outcome = { done: [] };
        const { onProgress, cancelled } = run.input;
        const objects = `${pursued.length} object${pursued.length === 1 ? '' : 's'}`;
        const startedAt = performance.now();
        let frame = current;
        try {
            onProgress(`Frame ${current} · starting ${objects}`, 0);
            let states = await start(run, current, pursued.map((object) => object.lastSeen.prompt));
            for (frame of frames) {
                if (cancelled()) {
                    throw new Cancelled();
                }
                const answer = await step(run, pursued, frame, states);
                states = answer.states;
                pursued.forEach((object, i) => {
                    if (!note(object, frame, answer.shapes[i])) {
                        outcome.malformed ??= `Frame ${frame}: the function's ${object.type} was `
                            + 'malformed and is left out.';
                    }
                });
                outcome.done.push(frame);
                const count = outcome.done.length;
                const seconds = (performance.now() - startedAt) / 1000 / count;
                run.percent = (100 * count) / frames.length;
                onProgress(
                    `Frame ${frame} (${count} of ${frames.length}) · ${objects} · `
                    + `${seconds.toFixed(1)} s/frame · `
                    + `${duration(seconds * (frames.length - count))} left`,
                    run.percent,
                );
            }
        } catch (error) {
            if (error instanceof Cancelled) {
                outcome.cancelled = frame;
            } else {
                outcome.failure = `Frame ${frame} failed: ${reason(error)}.`;
            }
        }
        return outcome;
    }

    /**
     * @param {Run} run
     * @param {number} frame
     * @param {Prompt[]} shapes
     * @returns {Promise<unknown[]>} states
     */
    async function start(run, frame, shapes) {
        const answer = await ask(run, frame, { type: 'init_tracking', shapes });
        return exactly(answer.states, shapes.length, 'states');
    }

    /**
     * Track one frame on; where a state has expired, start again from the last tracked shapes.
     * @param {Run} run
     * @param {Pursued[]} pursued
     * @param {number} frame
     * @param {unknown[]} states
     */
    async function step(run, pursued, frame, states) {
        const track = async (/** @type {unknown[]} */ from) => {
            const answer = await ask(run, frame, { type: 'track', states: from });
            return {
                shapes: exactly(answer.shapes, from.length, 'shapes'),
                states: exactly(answer.states, from.length, 'states'),
            };
        };
        try {
            return await track(states);
        } catch (error) {
            if (!isExpired(error)) {
                throw error;
            }
            return track(await restart(run, pursued));
        }
    }

    /**
     * @param {Run} run
     * @param {Pursued[]} pursued
     * @returns {Promise<unknown[]>} new states, by one request per frame they were last seen on
     */
    async function restart(run, pursued) {
        /** @type {unknown[]} */
        const states = [];
        for (const frame of new Set(pursued.map((object) => object.lastSeen.frame))) {
            const there = pursued.filter((object) => object.lastSeen.frame === frame);
            const fresh = await start(run, frame, there.map((object) => object.lastSeen.prompt));
            there.forEach((object, i) => {
                states[pursued.indexOf(object)] = fresh[i];
            });
        }
        return states;
    }

    /**
     * Call the function; repeat what may pass, with growing pauses.
     * @param {Run} run
     * @param {number} frame
     * @param {object} body
     * @returns {Promise<Answer>}
     */
    async function ask(run, frame, body) {
        const { core, model, session, input } = run;
        const inJob = session.taskId !== undefined;
        const taskId = session.taskId ?? session.id;
        const request = { ...body, frame, ...(inJob ? { job: session.id } : {}) };
        for (let attempt = 0; ; attempt += 1) {
            try {
                return await core.lambda.call(taskId, model, request);
            } catch (error) {
                if (!mayPass(error) || attempt === PAUSES_MS.length) {
                    throw error;
                }
                const pause = PAUSES_MS[attempt];
                input.onProgress(
                    `Frame ${frame}: ${reason(error)} · trying again in ${pause / 1000} s `
                    + `(${attempt + 1} of ${PAUSES_MS.length})`,
                    run.percent ?? 0,
                );
                await wait(pause, input.cancelled);
            }
        }
    }

    /**
     * @param {number} milliseconds
     * @param {() => boolean} cancelled
     */
    async function wait(milliseconds, cancelled) {
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
    function mayPass(error) {
        return [0, 503].includes(statusOf(error));
    }

    /**
     * CVAT refuses what it signed more than 8 hours ago with 400; the function answers 410.
     * @param {unknown} error
     */
    function isExpired(error) {
        const status = statusOf(error);
        return status === 410 || (status === 400 && /expired tracker state/i.test(String(error)));
    }

    /** @param {unknown} error */
    function reason(error) {
        const status = statusOf(error);
        const text = error instanceof Error ? error.message : String(error);
        const short = text.trim().replace(/\.+$/, '').slice(0, 300);
        return status && !short.includes(String(status)) ? `${status} ${short}` : short || 'no answer';
    }

    /**
     * @param {unknown} value
     * @param {number} length
     * @param {string} name
     * @returns {unknown[]}
     */
    function exactly(value, length, name) {
        if (!Array.isArray(value) || value.length !== length) {
            const count = Array.isArray(value) ? value.length : 'no';
            throw new Error(`the function answered ${count} ${name} for ${length} objects`);
        }
        return value;
    }

    /**
     * Note where an object is. `null` says it is not in the frame; a rectangle, for which stock
     * CVAT cannot take null, may say so by `outside`.
     * @param {Pursued} object
     * @param {number} frame
     * @param {unknown} answer
     * @returns {boolean} false for a malformed shape, which counts as not found
     */
    function note(object, frame, answer) {
        const shape = Array.isArray(answer) ? { type: 'rectangle', points: answer } : answer;
        const { type, points, outside } = /** @type {Partial<Keyframe>} */ (shape ?? {});
        const isThere = shape !== null && shape !== undefined && outside !== true;
        const visible = isThere && type === object.type && isSound(type, points);
        if (visible) {
            const there = /** @type {number[]} */ (points);
            object.lastSeen = { frame, prompt: { type: object.type, points: there } };
        }
        object.found.push({ frame, points: object.lastSeen.prompt.points, visible });
        return visible || !isThere;
    }

    /**
     * CVAT's commit stops half-way at a shape it cannot read, so none may reach it.
     * @param {string} type
     * @param {unknown} points
     */
    function isSound(type, points) {
        if (!Array.isArray(points) || !points.every(Number.isFinite)) {
            return false;
        }
        const [a, b, c, d] = points;
        switch (type) {
            case 'polygon': return points.length >= 6 && points.length % 2 === 0;
            case 'rectangle': return points.length === 4 && a < c && b < d;
            case 'ellipse': return points.length === 4 && a < c && b > d;
            case 'mask': return isSoundMask(points);
            default: return false;
        }
    }

    /** @param {number[]} points run lengths, then the box with its far edge included */
    function isSoundMask(points) {
        const runs = points.slice(0, -4);
        const [x1, y1, x2, y2] = points.slice(-4);
        const area = (x2 - x1 + 1) * (y2 - y1 + 1);
        return runs.length >= 1 && x1 <= x2 && y1 <= y2
            && points.every((value) => Number.isInteger(value) && value >= 0)
            && runs.reduce((sum, run) => sum + run, 0) === area;
    }

    // ------------------------------------------------------------------ results as tracks

    /**
     * The origin's keyframes with those from the first to the last touched frame replaced by what
     * was found; one on a deleted frame between them would bend its neighbours.
     * @param {Pursued} object
     * @param {number[]} touched the current frame and those tracked
     * @param {number} everyN
     * @param {number | undefined} next the job's first frame after all of them
     * @returns {Track}
     */
    function buildTrack(object, touched, everyN, next) {
        const { origin, original, mutable } = object;
        const [from, to] = [Math.min(...ends(touched)), Math.max(...ends(touched))];
        const keyframes = ascending([
            ...original.filter(({ frame }) => frame < from || frame > to),
            object.start,
            ...thinOut(object, everyN).map((found) => foundToKeyframe(object, found)),
        ]).map((keyframe) => ({ ...keyframe }));
        carryAttributes(original, keyframes);

        const last = Math.max(...ends(touched));
        const end = covering(keyframes, last);
        const wasOutside = 'shapes' in origin ? isOutside(original, Number(next)) : true;
        if (next !== undefined && wasOutside && end && !end.outside
            && !keyframes.some(({ frame }) => frame === next)) {
            keyframes.push({ ...end, frame: next, outside: true, attributes: [] });
        }
        const shapes = ascending(keyframes);
        return {
            frame: shapes[0].frame,
            label_id: origin.label_id,
            group: origin.group,
            source: 'semi-auto',
            attributes: origin.attributes.filter(({ spec_id: id }) => !mutable.has(String(id))),
            elements: [],
            shapes,
        };
    }

    /**
     * Every N-th, the last, both sides of a change of visibility, and where the origin changed
     * something else than its place.
     * @param {Pursued} object
     * @param {number} everyN
     */
    function thinOut({ found, start: first, original }, everyN) {
        return found.filter(({ frame, visible }, i) => {
            const before = i ? found[i - 1] : { ...first, visible: true };
            const after = found[i + 1] ?? { visible };
            return (i + 1) % everyN === 0 || i === found.length - 1
                || visible !== before.visible || visible !== after.visible
                || changesAt(original, frame);
        });
    }

    /**
     * @param {Keyframe[]} original
     * @param {number} frame
     */
    function changesAt(original, frame) {
        const i = original.findIndex((keyframe) => keyframe.frame === frame);
        return i > 0 && (original[i].attributes.length > 0
            || original[i].occluded !== original[i - 1].occluded
            || original[i].z_order !== original[i - 1].z_order);
    }

    /**
     * @param {Pursued} object
     * @param {{frame: number, points: number[], visible: boolean}} found
     * @returns {Keyframe}
     */
    function foundToKeyframe({ type, original }, { frame, points, visible }) {
        const like = covering(original, frame) ?? original[0];
        return {
            type,
            frame,
            points,
            rotation: 0,
            occluded: like.occluded,
            outside: !visible,
            z_order: like.z_order,
            attributes: [],
        };
    }

    /**
     * Attributes hold from their keyframe on: those of keyframes that are gone move to the next one,
     * and what the origin began with holds from the new beginning.
     * @param {Keyframe[]} original
     * @param {Keyframe[]} keyframes ascending; changed
     */
    function carryAttributes(original, keyframes) {
        for (const gone of [...original].reverse()) {
            const heir = keyframes.find(({ frame }) => frame >= gone.frame);
            if (heir) {
                heir.attributes = mergeAttributes(gone.attributes, heir.attributes);
            }
        }
        if (keyframes[0].frame < original[0].frame) {
            keyframes[0].attributes = [...original[0].attributes];
        }
    }

    /**
     * @param {Attribute[]} earlier
     * @param {Attribute[]} later win
     */
    function mergeAttributes(earlier, later) {
        const pairs = [...earlier, ...later]
            .map((attribute) => /** @type {const} */ ([String(attribute.spec_id), attribute]));
        return [...new Map(pairs).values()];
    }

    /**
     * @param {Keyframe[]} keyframes ascending
     * @param {number} frame
     * @returns {Keyframe | undefined} the last one up to the frame
     */
    function covering(keyframes, frame) {
        return keyframes.findLast((keyframe) => keyframe.frame <= frame);
    }

    /**
     * @param {Keyframe[]} keyframes ascending
     * @param {number} frame
     */
    function isOutside(keyframes, frame) {
        return covering(keyframes, frame)?.outside ?? true;
    }

    /**
     * @template {{frame: number}} T
     * @param {T[]} keyframes
     * @returns {T[]}
     */
    function ascending(keyframes) {
        return [...keyframes].sort((a, b) => a.frame - b.frame);
    }

    /**
     * @param {Keyframe} keyframe
     * @returns {Keyframe}
     */
    function withoutId({ id, ...rest }) {
        return rest;
    }

    // ------------------------------------------------------------------ one shape per frame

    /**
     * Add one shape per frame for each object that is no track, in the object's group; delete what
     * an earlier run left in their place.
     * @param {Run} run
     * @param {Pursued[]} pursued
     * @param {number[]} done
     * @param {ReturnType<typeof emptyResult>} result
     */
    async function collectShapes(run, pursued, done, result) {
        const { session, input } = run;
        const current = input.frameData.number;
        const fromShapes = pursued.filter(({ origin }) => !('shapes' in origin));
        const occupied = await clearEarlier(session, fromShapes, current, done, result);
        let group = Math.max(run.largestGroup, await largestGroupOf(session));
        for (const object of fromShapes.filter(({ asTrack }) => !asTrack)) {
            const origin = /** @type {Shape} */ (object.origin);
            const shapes = object.found
                .filter(({ frame, visible }) => visible && !occupied.get(object)?.has(frame))
                .map(({ frame, points }) => copyShape(
                    origin, { frame, points, rotation: 0, source: 'semi-auto' },
                ));
            if (shapes.length && !origin.group) {
                group += 1;
                shapes.unshift(copyShape(origin, {}));
                shapes.forEach((shape) => {
                    shape.group = group;
                });
                markDeleted(result, [object]);
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
        // A single object comes without the rest of the collection.
        return session.annotations.export
            ? findLargestGroup(await session.annotations.export()) : 0;
    }

    /** @param {Collection} collection */
    function findLargestGroup({ shapes, tracks }) {
        return [...shapes, ...tracks].reduce((largest, { group }) => Math.max(largest, group), 0);
    }

    /**
     * Delete an earlier run's shapes: of the same group, label and type, made by tracking. One that
     * a person drew, corrected or locked stays, and its frame is left to it.
     * @param {Session} session
     * @param {Pursued[]} objects
     * @param {number} current
     * @param {number[]} done
     * @param {ReturnType<typeof emptyResult>} result
     * @returns {Promise<Map<Pursued, Set<number>>>} the frames that an object must not fill
     */
    async function clearEarlier(session, objects, current, done, result) {
        /** @type {Map<Pursued, Set<number>>} */
        const occupied = new Map(objects.map((object) => [object, new Set()]));
        const byKey = groupBy(objects.filter(({ origin }) => origin.group), ({ origin, type }) => (
            seriesKey(origin.group, origin.label_id, type)
        ));
        if (!byKey.size) {
            return occupied;
        }
        const now = countSeries(await session.annotations.get(current, false, []));
        for (const frame of done) {
            const there = await session.annotations.get(frame, false, []);
            for (const [key, members] of byKey) {
                const earlier = there.filter((state) => seriesOf(state) === key);
                // More shapes than objects on a frame: some are not an earlier run's of these.
                const isAll = members.length === now.get(key) && earlier.length <= members.length;
                for (const [state, object] of matchEarlier(earlier, members, frame, isAll)) {
                    if (state.source !== 'semi-auto' || !isFree(state)) {
                        occupied.get(object)?.add(frame);
                    } else {
                        result.deleted.shapes.push({ clientID: state.clientID });
                    }
                }
            }
        }
        return occupied;
    }

    /**
     * Tell which object an earlier shape belongs to. In a group of several alike that is the one
     * whose new shape overlaps it most; shapes of alike objects that are not tracked now stay.
     * @param {ObjectState[]} earlier
     * @param {Pursued[]} members
     * @param {number} frame
     * @param {boolean} isAll whether these can only be the earlier shapes of the objects tracked now
     * @returns {Map<ObjectState, Pursued>}
     */
    function matchEarlier(earlier, members, frame, isAll) {
        const pairs = earlier.flatMap((state) => members.map((object) => {
            const found = object.found.find((one) => one.frame === frame);
            const box = boxOf(object.type, found?.points ?? object.start.points);
            return { state, object, overlap: overlapOf(boxOf(state.shapeType, state.points), box) };
        })).sort((a, b) => b.overlap - a.overlap);
        /** @type {Map<ObjectState, Pursued>} */
        const matched = new Map();
        const served = new Set();
        for (const { state, object, overlap } of pairs) {
            if (overlap > 0 && !matched.has(state) && !served.has(object)) {
                matched.set(state, object);
                served.add(object);
            }
        }
        if (isAll) {
            const unserved = members.filter((object) => !served.has(object));
            earlier.filter((state) => !matched.has(state))
                .forEach((state, index) => matched.set(state, unserved[index]));
        }
        return matched;
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

    /**
     * @param {string} type
     * @param {number[]} points
     * @returns {number[]} x1, y1, x2, y2
     */
    function boxOf(type, points) {
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
     * @param {number[]} a
     * @param {number[]} b
     * @returns {number} intersection over union
     */
    function overlapOf(a, b) {
        const width = Math.max(0, Math.min(a[2], b[2]) - Math.max(a[0], b[0]));
        const height = Math.max(0, Math.min(a[3], b[3]) - Math.max(a[1], b[1]));
        const area = (/** @type {number[]} */ [x1, y1, x2, y2]) => (x2 - x1) * (y2 - y1);
        return (width * height) / (area(a) + area(b) - width * height);
    }

    // ------------------------------------------------------------------ what the annotator reads

    /** @param {number[]} frames in tracking order */
    function ends(frames) {
        return [frames[0], frames[frames.length - 1]];
    }

    /** @param {number[]} frames in tracking order */
    function span(frames) {
        const [from, to] = ends(frames);
        return `frames ${Math.min(from, to)} to ${Math.max(from, to)}`;
    }

    /** @param {number} seconds */
    function duration(seconds) {
        const whole = Math.round(seconds);
        const [minutes, hours] = [Math.floor(whole / 60), Math.floor(whole / 3600)];
        return hours ? `${hours} h ${minutes % 60} min`
            : minutes ? `${minutes} min ${whole % 60} s` : `${whole} s`;
    }

    /** @type {HTMLElement | null} */
    let notice = null;

    function dismissNotice() {
        notice?.remove();
        notice = null;
    }

    /**
     * Say what an action cannot: it may either return a result or throw a message, not both.
     * @param {string} title
     * @param {(string | number | undefined)[]} parts nothing is said when all are empty
     * @param {string} end
     */
    function notify(title, parts, end) {
        const said = parts.filter(Boolean);
        dismissNotice();
        if (!said.length) {
            return;
        }
        const text = [...said, end].join(' ');
        notice = document.createElement('div');
        notice.setAttribute('role', 'status');
        notice.className = 'sam2-tracker-notice';
        notice.textContent = `${title}: ${text} (click to close)`;
        notice.style.cssText = 'position:fixed;top:16px;right:16px;z-index:10000;max-width:420px;'
            + 'padding:12px 16px;background:#fffbe6;color:#333;border:1px solid #ffe58f;'
            + 'border-radius:6px;box-shadow:0 4px 12px rgba(0,0,0,.2);cursor:pointer';
        notice.addEventListener('click', dismissNotice);
        document.body.append(notice);
        console.warn(LOG, text);
    }

    // ------------------------------------------------------------------ registering

    /** @returns {Promise<Core | null>} null: not a CVAT that has annotation actions */
    async function findCore() {
        const page = /** @type {{cvat?: Partial<Core>}} */ (globalThis);
        for (let waited = 0; !page.cvat && waited < CORE_WAIT_MS; waited += POLL_MS) {
            await sleep(POLL_MS);
        }
        const { actions, classes, lambda } = page.cvat ?? {};
        const isThere = actions?.register && classes?.BaseCollectionAction
            && lambda?.list && lambda?.call;
        return isThere ? /** @type {Core} */ (page.cvat) : null;
    }

    /** @typedef {Map<string, {model: Model, action: {name: string}}>} Registered by function id */

    /**
     * Make the registered actions those of the trackers that the server lists now.
     * @param {Core} core
     * @param {Registered} registered changed
     */
    async function refresh(core, registered) {
        const { models } = await core.lambda.list();
        const trackers = models.filter((model) => model.kind === 'tracker');
        for (const [id, { action }] of registered) {
            if (!trackers.some((model) => model.id === id) && await unregister(core, action)) {
                registered.delete(id);
            }
        }
        for (const model of trackers) {
            const known = registered.get(model.id);
            if (known) {
                known.model = model;
            } else {
                await register(core, registered, model);
            }
        }
    }

    /**
     * @param {Core} core
     * @param {Registered} registered
     * @param {Model} model
     */
    async function register(core, registered, model) {
        const taken = new Set((await core.actions.list()).map(({ name }) => name));
        const name = [model.name, `${model.name} (${model.id})`].find((one) => !taken.has(one));
        if (name) {
            const action = createAction(core, name, () => registered.get(model.id)?.model);
            await core.actions.register(action);
            registered.set(model.id, { model, action });
        }
    }

    /**
     * @param {Core} core
     * @param {{name: string}} action
     * @returns {Promise<boolean>} whether CVAT no longer lists it
     */
    async function unregister({ actions }, action) {
        // CVAT's documentation does not say whether it wants the action or its name.
        for (const handle of [action, action.name]) {
            await actions.unregister?.(handle)?.catch(() => undefined);
            if (!(await actions.list()).some(({ name }) => name === action.name)) {
                return true;
            }
        }
        return false;
    }

    /**
     * Ask the server for its functions again and again: listing fails before the login, and
     * functions come and go.
     * @param {Core} core
     */
    async function watch(core) {
        /** @type {Registered} */
        const registered = new Map();
        let address = '';
        let dueAt = 0;
        for (;;) {
            const { pathname } = window.location;
            const isDue = pathname !== address || performance.now() >= dueAt;
            if (isDue && !document.hidden && !pathname.startsWith('/auth')) {
                address = pathname;
                const again = await refresh(core, registered)
                    .then(() => LIST_AGAIN_MS, () => LIST_RETRY_MS);
                dueAt = performance.now() + again;
            }
            await sleep(WATCH_MS);
        }
    }

    async function main() {
        const page = /** @type {{sam2TrackerAction?: boolean}} */ (globalThis);
        if (page.sam2TrackerAction) {
            return; // loaded twice, by the server and as a user script
        }
        page.sam2TrackerAction = true;
        const core = await findCore();
        if (core) {
            await watch(core);
        } else {
            console.info(LOG, 'this page has no CVAT with annotation actions; nothing was added.');
        }
    }

    main();
})();
