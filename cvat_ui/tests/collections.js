// Collections as CVAT 2.54 passes them to an action (recorded_input.json was recorded from it), for
// the test clip: 12 frames of 320 x 180, where a disc moves right by 5 pixels a frame from (60, 90)
// and a block moves left by 4 from (220, 40).

export const JOB = {
    id: 4,
    taskId: 4,
    startFrame: 0,
    stopFrame: 11,
    labels: [{
        id: 4,
        name: 'oval',
        attributes: [{ id: 21, mutable: false }, { id: 22, mutable: true }],
    }],
};

export const FIXED = { spec_id: 21, value: 'red' };
export const CHANGING = { spec_id: 22, value: 'standing' };

/** A mask in CVAT's run lengths: a filled box, far edge included. */
export function boxMask(x1, y1, x2, y2) {
    return [0, (x2 - x1 + 1) * (y2 - y1 + 1), x1, y1, x2, y2];
}

export function shape(clientID, type, points, changes = {}) {
    return {
        type,
        clientID,
        occluded: false,
        outside: false,
        z_order: 0,
        points,
        rotation: 0,
        attributes: [],
        elements: [],
        frame: 0,
        label_id: 4,
        group: 0,
        source: 'manual',
        id: clientID - 7,
        ...changes,
    };
}

export function keyframe(type, frame, points, changes = {}) {
    return {
        type,
        occluded: false,
        z_order: 0,
        rotation: 0,
        outside: false,
        attributes: [],
        id: 100 + frame,
        frame,
        points,
        ...changes,
    };
}

export function track(clientID, shapes, changes = {}) {
    return {
        clientID,
        label_id: 4,
        frame: shapes[0].frame,
        group: 0,
        source: 'manual',
        attributes: [],
        elements: [],
        shapes,
        id: clientID - 12,
        ...changes,
    };
}

export const DISC = {
    mask: boxMask(40, 70, 80, 110),
    polygon: [60, 60, 90, 90, 60, 120, 30, 90],
    rectangle: [30, 60, 91, 121],
    ellipse: [60.5, 90.5, 90.5, 60.5],
};
export const BLOCK = {
    mask: boxMask(220, 40, 270, 100),
    polygon: [220, 40, 271, 40, 271, 101, 220, 101],
    rectangle: [220, 40, 271, 101],
};

/** The points `dx` pixels further right. */
export function moved(points, dx) {
    return points.map((value, i) => (i % 2 === 0 ? value + dx : value));
}
