-- Has the login of the drill all its rights, and is the table there that it writes? A standby has what its primary has.
SELECT pg_is_in_recovery() OR coalesce((
    SELECT rolcanlogin AND NOT rolsuper
        AND pg_has_role(rolname, 'pg_read_all_data', 'USAGE')
        AND has_database_privilege(rolname, current_database(), 'CONNECT')
        AND has_table_privilege(rolname, to_regclass('larder_backup.drills'), 'INSERT')
    FROM pg_roles WHERE rolname = %(login)s
), false) AS ready
